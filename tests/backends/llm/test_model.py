"""A language model on an engine process: streams, cancellation, names, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from naiad.backends.llm.model import EngineLanguageModel, load_language_model
from naiad.backends.llm.tokenizer import Tokenizer
from naiad.core.errors import InvalidModel, InvalidRequest, Unavailable
from naiad.core.generation import (
    ChatPrompt,
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from naiad.core.metrics import Registry
from naiad.engine.config import EngineConfig
from tests.backends.llm import fake_engine
from tests.backends.llm.conftest import MakeModel, byte_level_tokenizer, write_text_files

pytestmark = pytest.mark.anyio

FOREVER = SamplingParams(max_tokens=4000, ignore_eos=True)


def ask(text: str, **sampling: object) -> GenerateRequest:
    return GenerateRequest(
        id="r",
        prompt=TextPrompt(text),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
    )


async def answer(model: EngineLanguageModel, request: GenerateRequest) -> list[GenerateDelta]:
    return [delta async for delta in model.generate(request)]


def text_of(deltas: list[GenerateDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


async def test_streams_the_engines_tokens_as_text(make_model: MakeModel) -> None:
    model = await make_model()

    deltas = await answer(model, ask("the cat sat", max_tokens=8))

    assert text_of(deltas).startswith("the cat sat")
    assert sum(len(delta.token_ids) for delta in deltas) == 8
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.text == "the cat sat"


async def test_several_answers_come_interleaved_and_each_ends_once(make_model: MakeModel) -> None:
    model = await make_model()

    deltas = await answer(model, ask("the cat sat", max_tokens=5, n=3))

    ends = [delta.index for delta in deltas if delta.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    for index in range(3):
        assert sum(len(d.token_ids) for d in deltas if d.index == index) == 5


async def test_a_long_prompt_is_read_in_a_thread_with_the_same_result(
    make_model: MakeModel,
) -> None:
    model = await make_model(config={"max_model_len": 8192})
    text = "the cat sat on the mat " * 300

    deltas = await answer(model, ask(text, max_tokens=1))

    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_tokens > 1000


async def test_a_chat_is_rendered_by_the_checkpoints_template(make_model: MakeModel) -> None:
    model = await make_model()
    prompt = ChatPrompt(({"role": "user", "content": "the cat"},))

    deltas = await answer(
        model, GenerateRequest(id="r", prompt=prompt, sampling=SamplingParams(max_tokens=2))
    )

    assert deltas[0].prompt is not None
    assert deltas[0].prompt.text == "<s><|user|>the cat<|end|><|assistant|>"


async def test_what_cannot_run_is_refused_before_the_first_delta(make_model: MakeModel) -> None:
    model = await make_model()
    request = GenerateRequest(id="r", prompt=TokensPrompt((5,) * 5000))

    with pytest.raises(InvalidRequest, match="5000 tokens, the model takes at most 4096"):
        await answer(model, request)


async def test_closing_the_stream_frees_the_engine_at_once(make_model: MakeModel) -> None:
    model = await make_model(step_s=0.001)
    stream = model.generate(GenerateRequest(id="r", prompt=TextPrompt("the cat"), sampling=FOREVER))
    await anext(stream)

    await stream.aclose()  # type: ignore[attr-defined]

    assert model.client.num_in_flight == 0
    await idle(model)


async def test_cancelling_the_reader_frees_the_engine_at_once(make_model: MakeModel) -> None:
    model = await make_model(step_s=0.001)
    first = asyncio.Event()

    async def read() -> None:
        request = GenerateRequest(id="r", prompt=TextPrompt("the cat"), sampling=FOREVER)
        async for _ in model.generate(request):
            first.set()

    reader = asyncio.create_task(read())
    await first.wait()
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader

    assert model.client.num_in_flight == 0
    await idle(model)


async def test_a_stop_string_frees_the_engine_although_nobody_reads(make_model: MakeModel) -> None:
    model = await make_model(step_s=0.001)
    stream = model.generate(ask("the cat sat", stop=("satthe",), max_tokens=4000))
    await anext(stream)

    await idle(model)  # not one more delta was taken

    rest = [delta async for delta in stream]
    assert rest[-1].stop_reason == "satthe"
    assert text_of(rest) == "the cat "


async def test_a_stop_string_ends_only_its_own_answer(make_model: MakeModel) -> None:
    model = await make_model()

    prompt = TokensPrompt(tuple(range(20, 60)))  # answer i says it from token i on
    request = GenerateRequest(
        id="r", prompt=prompt, sampling=SamplingParams(n=3, stop=(token_text(20),), max_tokens=9)
    )

    deltas = await answer(model, request)

    reasons = {delta.index: delta.stop_reason for delta in deltas if delta.finish_reason}
    assert reasons == {0: token_text(20), 1: None, 2: None}
    assert sum(len(delta.token_ids) for delta in deltas if delta.index == 1) == 9
    await idle(model)


async def test_a_stop_string_frees_its_answers_row_at_once(make_model: MakeModel) -> None:
    model = await make_model(step_s=0.001)
    prompt = TokensPrompt(tuple(range(20, 100)))  # answer 1 comes to token 20 after 79 steps
    request = GenerateRequest(
        id="r", prompt=prompt, sampling=SamplingParams(n=2, stop=(token_text(20),), max_tokens=400)
    )

    reading = asyncio.create_task(answer(model, request))
    rows = set()
    while not reading.done():
        rows.add(model.client.stats.num_running)
        await asyncio.sleep(0)

    assert {delta.stop_reason for delta in await reading if delta.finish_reason} == {token_text(20)}
    assert 1 in rows, "the engine went on with the answer that had ended"


async def test_a_slow_reader_gets_several_steps_in_one_delta(make_model: MakeModel) -> None:
    model = await make_model()
    stream = model.generate(ask("the cat sat", max_tokens=3000, ignore_eos=True))
    deltas = [await anext(stream)]

    await idle(model)  # the whole answer arrives while nobody reads
    deltas += [delta async for delta in stream]

    assert len(deltas) < 20
    assert sum(len(delta.token_ids) for delta in deltas) == 3000
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[-1].timing is not None


async def test_it_answers_to_the_served_name_the_folders_name_and_the_path(tmp_path: Path) -> None:
    path = write_text_files(tmp_path / "tiny")
    model = await load_language_model(
        path, EngineConfig(), ["mine", "ours"], command=fake_engine.COMMAND
    )
    await model.close()

    assert model.metadata.name == "mine"
    assert model.metadata.aliases == ("ours", "tiny", str(path))
    assert model.created_s > 0
    assert model.max_model_len == 4096
    assert not model.is_ready()


async def test_without_a_tokenizer_no_process_is_started(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        await load_language_model(tmp_path, EngineConfig())


async def test_metrics_have_vllms_names_and_survive_a_restart(make_model: MakeModel) -> None:
    model = await make_model(exit_token=9)
    for _ in range(2):
        await answer(model, ask("the cat", max_tokens=3))
    with pytest.raises(Unavailable):
        await answer(model, GenerateRequest(id="r", prompt=TokensPrompt((9,))))
    await answer(model, ask("the cat", max_tokens=3))

    registry = Registry()
    registry.register(model.extra_metrics)
    text = registry.exposition().decode()

    label = 'model_name="tiny",engine="0"'
    assert f"vllm:generation_tokens_total{{{label}}} 9" in text
    assert f'vllm:request_success_total{{{label},finished_reason="length"}} 3' in text
    assert f'vllm:request_success_total{{{label},finished_reason="error"}} 1' in text
    assert f"vllm:time_to_first_token_seconds_count{{{label}}} 3" in text
    assert f"vllm:inter_token_latency_seconds_count{{{label}}} 6" in text
    assert f"vllm:time_per_output_token_seconds_count{{{label}}} 6" in text
    assert f"vllm:num_requests_running{{{label}}} 0" in text
    assert f"naiad:engine_restarts_total{{{label}}} 1" in text
    assert 'vllm:cache_config_info{model_name="tiny",engine="0",block_size="64"' in text


def token_text(token_id: int) -> str:
    return Tokenizer(byte_level_tokenizer(), {}).token_text(token_id)


async def idle(model: EngineLanguageModel) -> None:
    """Until the engine has reported that nothing runs."""
    deadline_s = time.monotonic() + 10
    while model.client.stats.num_running or model.client.num_in_flight:
        assert time.monotonic() < deadline_s, model.client.stats
        await asyncio.sleep(0)
