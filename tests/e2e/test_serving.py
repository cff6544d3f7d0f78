"""What a served model says is what the same checkpoint says in-process, over every protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from naiad import LLM, SamplingParams
from naiad.backends.llm.offline import CompletionOutput, RequestOutput
from naiad.core.generation import PositionLogprobs
from tests.e2e.servers import (
    ANY_PORT,
    ONE_THREAD,
    Samples,
    ServerProcess,
    is_idle,
    serving,
    starting,
)
from tools.make_tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PROMPT = "Once upon a time"
MESSAGES = [
    {"role": "system", "content": "You are a river."},
    {"role": "user", "content": "Où est la bibliothèque ?"},
]
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
DRAWN: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": 11, "ignore_eos": True}
CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "greedy until it ends": {"max_tokens": 200, "temperature": 0.0},
    "drawn": DRAWN,
    "three answers": DRAWN | {"n": 3},
    "top k, p, min p": DRAWN | {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": GREEDY
    | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "stop strings": GREEDY | {"stop": ("ea", "in")},
    "stop string kept": GREEDY | {"stop": ("ea", "in"), "include_stop_str_in_output": True},
    "bias": GREEDY | {"logit_bias": {300: 50.0}, "max_tokens": 4},
    "logprobs": GREEDY | {"logprobs": 3},
    "drawn logprobs": DRAWN | {"logprobs": 2, "n": 2},
}
EXTRA = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "include_stop_str_in_output"}
"""Not in OpenAI's protocol; its client sends them as `extra_body`."""


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, num_threads=1) as loaded:
        yield loaded


@pytest.fixture
async def client(server: ServerProcess) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        yield made


def expected(llm: LLM, options: Mapping[str, Any], *, chat: bool = False) -> RequestOutput:
    params = SamplingParams(**options)
    if chat:
        return llm.chat(MESSAGES, params, use_tqdm=False)[0]
    return llm.generate(PROMPT, params, use_tqdm=False)[0]


def arguments(options: Mapping[str, Any], *, chat: bool = False) -> dict[str, Any]:
    """`SamplingParams`' fields as arguments of OpenAI's client."""
    named = {key: value for key, value in options.items() if key not in EXTRA}
    if "stop" in named:
        named["stop"] = list(named["stop"])
    if "logit_bias" in named:
        named["logit_bias"] = {str(token): bias for token, bias in named["logit_bias"].items()}
    if chat and "logprobs" in named:
        named |= {"logprobs": True, "top_logprobs": named["logprobs"]}
    return named | {"extra_body": {key: options[key] for key in options.keys() & EXTRA}}


class Answer:
    """One choice, put together from a stream's chunks or read from a whole reply."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.tokens: list[str] = []
        self.logprobs: list[float] = []
        self.tops: list[list[float]] = []

    def add(self, choice: Any) -> None:
        content = getattr(choice, "delta", None) or getattr(choice, "message", None)
        self.text += (content.content if content else choice.text) or ""
        self.finish_reason = choice.finish_reason or self.finish_reason
        lines = choice.logprobs
        if lines is not None and content is not None:
            self.tokens += [line.token for line in lines.content]
            self.logprobs += [line.logprob for line in lines.content]
            self.tops += [[top.logprob for top in line.top_logprobs] for line in lines.content]
        elif lines is not None:
            self.tokens += lines.tokens
            self.logprobs += lines.token_logprobs
            self.tops += [sorted(top.values(), reverse=True) for top in lines.top_logprobs]


def check(answer: Answer, golden: CompletionOutput) -> None:
    assert answer.text == golden.text
    assert answer.finish_reason == golden.finish_reason
    positions: list[PositionLogprobs] = golden.logprobs or []
    assert answer.tokens == [position.chosen.token for position in positions]
    chosen = [position.chosen.logprob for position in positions]
    assert answer.logprobs == pytest.approx(chosen, abs=1e-4)
    for found, position in zip(answer.tops, positions, strict=True):
        assert found == pytest.approx([top.logprob for top in position.top], abs=1e-4)


async def streamed(
    client: openai.AsyncOpenAI, server: ServerProcess, options: Mapping[str, Any], *, chat: bool
) -> tuple[list[Answer], Any]:
    route: Any = client.chat.completions if chat else client.completions
    prompt = {"messages": MESSAGES} if chat else {"prompt": PROMPT}
    answers = [Answer() for _ in range(options.get("n", 1))]
    usage = None
    async for chunk in await route.create(
        model=server.name,
        stream=True,
        stream_options={"include_usage": True},
        **prompt,
        **arguments(options, chat=chat),
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            answers[choice.index].add(choice)
    return answers, usage


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
async def test_streams_read_by_openais_client_say_what_the_model_says_in_process(
    client: openai.AsyncOpenAI, server: ServerProcess, llm: LLM, *, chat: bool
) -> None:
    served = await asyncio.gather(  # all at once, so that they share steps
        *(streamed(client, server, options, chat=chat) for options in CASES.values())
    )
    for (answers, usage), options in zip(served, CASES.values(), strict=True):
        golden = expected(llm, options, chat=chat)
        assert len(answers) == len(golden.outputs)
        for answer, output in zip(answers, golden.outputs, strict=True):
            check(answer, output)
        assert usage.prompt_tokens == len(golden.prompt_token_ids)
        assert usage.completion_tokens == sum(len(o.token_ids) for o in golden.outputs)


@pytest.mark.parametrize("name", CASES)
async def test_whole_replies_say_the_same(
    client: openai.AsyncOpenAI, server: ServerProcess, llm: LLM, name: str
) -> None:
    options = CASES[name]
    for chat in (False, True):
        route: Any = client.chat.completions if chat else client.completions
        prompt = {"messages": MESSAGES} if chat else {"prompt": PROMPT}
        reply = await route.create(model=server.name, **prompt, **arguments(options, chat=chat))
        golden = expected(llm, options, chat=chat)
        for choice, output in zip(reply.choices, golden.outputs, strict=True):
            answer = Answer()
            answer.add(choice)
            check(answer, output)
            assert choice.stop_reason == output.stop_reason
    assert "stop" not in name or golden.outputs[0].finish_reason == "stop"


async def test_prompts_as_token_ids_and_several_at_once(
    client: openai.AsyncOpenAI, server: ServerProcess, llm: LLM
) -> None:
    prompts = [[0, 40, 50, 60], [0, 70, 80], list(range(10, 140))]
    options: dict[str, Any] = DRAWN | {"n": 2}
    reply = await client.completions.create(model=server.name, prompt=prompts, **arguments(options))
    goldens = llm.generate(prompts, SamplingParams(**options), use_tqdm=False)
    texts = [output.text for golden in goldens for output in golden.outputs]
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text for choice in reply.choices] == texts
    assert len(set(texts)) == 6


# ---- KServe v2 and Triton's generate extension, with the bodies of two backends' users


def post(server: ServerProcess, action: str, body: dict[str, Any]) -> httpx2.Response:
    url = f"{server.url}/v2/models/{server.name}/{action}"
    return httpx2.post(url, json=body, timeout=30).raise_for_status()


VLLM_BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parameters": (
        {"parameters": {"stream": False, "temperature": 0}},
        {"max_tokens": 16, "temperature": 0.0},
    ),
    "numbers as strings": (
        {"parameters": {"temperature": "0", "max_tokens": "20", "seed": "3"}},
        {"max_tokens": 20, "temperature": 0.0},
    ),
    "sampling_parameters": (
        {"sampling_parameters": '{"temperature": 1.0, "seed": 5, "top_k": 9, "max_tokens": 12}'},
        {"max_tokens": 12, "temperature": 1.0, "seed": 5, "top_k": 9},
    ),
}
TENSORRT_BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tutorial": (
        {"max_tokens": 20, "bad_words": "", "stop_words": "", "pad_id": 2, "end_id": 2},
        {"max_tokens": 20, "stop_token_ids": (2,)},
    ),
    "greedy": (
        {"max_tokens": 20, "top_k": 1, "temperature": 1.0, "stop_words": ["ea", "in"]},
        {"max_tokens": 20, "top_k": 1, "temperature": 1.0, "stop": ("ea", "in")},
    ),
    "drawn": (
        {"max_tokens": 20, "top_p": 0.9, "temperature": 0.7, "seed": 9, "end_id": -1},
        {"max_tokens": 20, "top_p": 0.9, "temperature": 0.7, "seed": 9, "ignore_eos": True},
    ),
}
BODIES = {f"vllm {name}": case for name, case in VLLM_BODIES.items()} | {
    f"tensorrt {name}": case for name, case in TENSORRT_BODIES.items() if name != "tutorial"
}


@pytest.mark.parametrize("name", BODIES)
def test_generate_repeats_the_prompt_and_says_what_the_model_says(
    server: ServerProcess, llm: LLM, name: str
) -> None:
    body, options = BODIES[name]
    reply = post(server, "generate", {"text_input": PROMPT} | body).json()
    golden = expected(llm, options).outputs[0].text
    assert reply["text_output"] == PROMPT + golden
    assert (reply["model_name"], reply["model_version"]) == (server.name, "1")

    alone = {"text_input": PROMPT, "exclude_input_in_output": True} | body
    assert post(server, "generate", alone).json()["text_output"] == golden


@pytest.mark.parametrize("name", BODIES)
def test_generate_stream_says_the_same(server: ServerProcess, llm: LLM, name: str) -> None:
    body, options = BODIES[name]
    parameters = {k: v for k, v in body.get("parameters", {}).items() if k != "stream"}
    body = {"text_input": PROMPT, "stream": True, **body, "parameters": parameters}
    reply = post(server, "generate_stream", body)
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
    golden = expected(llm, options).outputs[0]
    assert "".join(event["text_output"] for event in events) == golden.text


def test_generate_stream_says_it_in_pieces(server: ServerProcess) -> None:
    """Long enough that a busy machine, where waiting pieces come together, still sends several."""
    sampling = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
    body = {"text_input": PROMPT, "stream": True, "parameters": sampling}
    reply = post(server, "generate_stream", body)
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
    assert len(events) > 2


def test_the_tutorials_of_the_tensorrt_backend_run_as_they_are(
    server: ServerProcess, llm: LLM
) -> None:
    body, _ = TENSORRT_BODIES["tutorial"]
    reply = post(server, "generate", {"text_input": "What is machine learning?"} | body).json()
    assert reply["text_output"].startswith("What is machine learning?")
    assert len(reply["text_output"]) > len("What is machine learning?")

    counting = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    body = {"text_input": PROMPT, "max_tokens": 6, "temperature": 0.0, "return_log_probs": True}
    reply = post(server, "generate", body | counting).json()
    golden = expected(llm, {"max_tokens": 6, "temperature": 0.0, "logprobs": 0})
    logprobs = [position.chosen.logprob for position in golden.outputs[0].logprobs or []]
    assert reply["output_log_probs"] == pytest.approx(logprobs, abs=1e-4)
    assert reply["cum_log_probs"] == pytest.approx(sum(logprobs), abs=1e-3)
    assert reply["num_input_tokens"] == len(golden.prompt_token_ids)
    assert reply["num_output_tokens"] == 6


@pytest.mark.parametrize("batched", [False, True], ids=["vllm", "tensorrt"])
def test_infer_takes_the_options_as_tensors(
    server: ServerProcess, llm: LLM, *, batched: bool
) -> None:
    shape = [1, 1] if batched else [1]
    values: list[tuple[str, str, Any]] = [("text_input", "BYTES", PROMPT)]
    if batched:
        values += [("max_tokens", "INT32", 20), ("temperature", "FP32", 0.0)]
        values += [("return_num_output_tokens", "BOOL", True), ("stream", "BOOL", False)]
    else:
        sampling = json.dumps({"max_tokens": 20, "temperature": 0})
        values += [("sampling_parameters", "BYTES", sampling), ("stream", "BOOL", False)]
        values += [("return_finish_reason", "BOOL", True)]
    values += [("exclude_input_in_output", "BOOL", True)]
    inputs = [
        {"name": name, "datatype": datatype, "shape": shape, "data": [value]}
        for name, datatype, value in values
    ]
    reply = post(server, "infer", {"id": "mine", "inputs": inputs}).json()
    outputs = {output["name"]: output for output in reply["outputs"]}
    golden = expected(llm, {"max_tokens": 20, "temperature": 0.0}).outputs[0]
    assert reply["id"] == "mine"
    assert outputs["text_output"]["data"] == [golden.text]
    if batched:
        assert outputs["num_output_tokens"]["data"] == [len(golden.token_ids)]
    else:
        assert outputs["finish_reason"]["data"] == [golden.finish_reason]


# ---- metrics


def test_metrics_of_both_ports_parse_and_add_up_with_what_was_sent(server: ServerProcess) -> None:
    before = server.until(is_idle)
    num_prompt = num_generated = 0
    for number in range(5):
        reply = server.complete(prompt=f"{number} foxes", max_tokens=3 + number, ignore_eos=True)
        usage = reply.json()["usage"]
        num_prompt += usage["prompt_tokens"]
        num_generated += usage["completion_tokens"]
    both = server.complete(prompt=["a fox", "a dog"], n=2, max_tokens=4, ignore_eos=True).json()
    num_prompt += both["usage"]["prompt_tokens"]
    num_generated += both["usage"]["completion_tokens"]
    post(server, "generate", {"text_input": "a", "max_tokens": 7, "end_id": -1})
    num_prompt += len("a") + 1  # and the begin of the sequence
    num_generated += 7
    assert server.complete(max_tokens=0).status_code == 400
    after = server.until(is_idle)
    other = Samples(httpx2.get(f"{server.url}/metrics").text)

    grown = {
        "nv_inference_request_success": 5 + 2 + 1,
        "nv_inference_count": 5 + 2 + 1,
        "vllm:request_success_total": 5 + 4 + 1,
        "vllm:prompt_tokens_total": num_prompt,
        "vllm:generation_tokens_total": num_generated,
        "vllm:request_prompt_tokens_count": 5 + 2 + 1,
        "vllm:request_prompt_tokens_sum": num_prompt,
        "vllm:request_generation_tokens_sum": num_generated,
        "vllm:time_to_first_token_seconds_count": 5 + 4 + 1,
        "vllm:e2e_request_latency_seconds_count": 5 + 4 + 1,
        "vllm:inter_token_latency_seconds_count": num_generated - (5 + 4 + 1),
    }
    assert num_generated == sum(range(3, 8)) + 16 + 7
    assert {name: after[name] - before[name] for name in grown} == grown
    assert after.get("vllm:request_success_total", finished_reason="length") > 0
    for name in ("nv_inference_request_duration_us", "nv_inference_compute_infer_duration_us"):
        assert after[name] > before[name]
    assert other.names() == after.names()
    assert {name: other[name] for name in grown} == {name: after[name] for name in grown}


# ---- settings


SETTINGS: dict[str, dict[str, Any]] = {
    "server": {
        "http_address": "127.0.0.1",
        "http_port": 0,
        "metrics_port": 0,
        "http_max_input_size": 2000,
    },
    "model": {"served_model_name": ["river", "brook"]},
    "engine": {
        "num_threads": 1,
        "max_num_seqs": 4,
        "max_model_len": 128,
        "kv_layout": "pages",
        "kv_page_tokens": 32,
        "prefix_cache": False,
    },
    "log": {"log_format": "text"},
}


def as_toml() -> str:
    lines = []
    for section, table in SETTINGS.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    return "\n".join(lines)


def as_environment() -> dict[str, str]:
    return {
        f"NAIAD_{section}__{name}".upper(): ",".join(value)
        if isinstance(value, list)
        else str(value).lower()
        for section, table in SETTINGS.items()
        for name, value in table.items()
    }


def as_flags() -> list[str]:
    flags = []
    for name, value in (item for table in SETTINGS.values() for item in table.items()):
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-"))
        else:
            items = value if isinstance(value, list) else [value]
            flags += [word for item in items for word in (flag, str(item))]
    return flags


def observe(server: ServerProcess) -> dict[str, Any]:
    """What tells the settings apart from the defaults."""
    reply = server.complete(max_tokens=9)
    repeated = [server.complete(prompt=[7] * 100, max_tokens=1).status_code for _ in range(2)]
    return {
        "table": {name: server.table[name] for name in ("model", "also called", "context")},
        "KV cache": server.table["KV cache"],
        "choices": reply.json()["choices"],
        "other name": server.complete(model="brook", max_tokens=1).status_code,
        "body of 2 kB": server.complete(prompt="x" * 2000).status_code,
        "too long": server.complete(prompt=[7] * 128).text,
        "repeated": repeated,
        "prefix hits": server.metrics()["vllm:prefix_cache_hits_total"],
        "text log": not server.log.read_text().startswith("{"),
    }


def test_a_file_the_environment_and_flags_make_the_same_server(
    checkpoint: Path, tmp_path: Path
) -> None:
    file, other = tmp_path / "naiad.toml", tmp_path / "other.toml"
    file.write_text(as_toml())
    # What the other two places win over; and a flag over the environment.
    other.write_text('[engine]\nmax_num_seqs = 3\nprefix_cache = true\n[log]\nlog_level = "info"\n')
    mixed = as_environment() | {"NAIAD_ENGINE__MAX_NUM_SEQS": "2"}
    ways: list[tuple[list[str], dict[str, str]]] = [
        (["--config", str(file)], {}),
        ([], as_environment()),
        (as_flags(), {}),
        (["--config", str(other), "--max-num-seqs", "4"], mixed),
    ]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                starting(checkpoint, tmp_path / str(number), *flags, environment=environment)
            )
            for number, (flags, environment) in enumerate(ways)
        ]
        seen = [observe(ServerProcess(process, log)) for process, log in started]

    first = seen[0]
    assert seen == [first] * len(ways)
    assert first["table"]["model"] == ["river"]
    assert first["table"]["context"] == ["128 tokens"]
    assert first["KV cache"][0].endswith(", 4 sequences")
    assert first["body of 2 kB"] == 413
    assert "128" in first["too long"]
    assert (first["other name"], first["repeated"]) == (200, [200, 200])
    assert first["prefix hits"] == 0
    assert first["text log"]


async def test_another_family_is_served_as_well(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "other", family="gpt2", chat_template=False)
    with LLM(path, num_threads=1) as llm:
        goldens = [expected(llm, GREEDY, chat=chat) for chat in (False, True)]
    with serving(path, tmp_path / "server", *ANY_PORT, *ONE_THREAD) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            for chat, golden in zip((False, True), goldens, strict=True):
                (answer,), _ = await streamed(client, server, GREEDY, chat=chat)
                check(answer, golden.outputs[0])
