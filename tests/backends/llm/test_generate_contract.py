"""The contract of `LanguageModel.generate`, kept by every implementation.

Run on a real engine process with a tiny checkpoint, and on the scripted model.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from naiad.backends.llm.model import EngineLanguageModel, load_language_model
from naiad.backends.scripted import ScriptedLanguageModel
from naiad.core.errors import InvalidRequest, QueueFull, Unavailable
from naiad.core.generation import (
    ChatPrompt,
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from naiad.core.language import LanguageModel
from naiad.engine.config import EngineConfig

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
SCRIPT = [" the", " cat", " sat", " on", " a", " mat", "."]


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tools.make_tiny_checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("contract") / "tiny")


@pytest.fixture(scope="module", params=["engine", "scripted"])
async def model(request: pytest.FixtureRequest) -> AsyncIterator[LanguageModel]:
    made: LanguageModel
    if request.param == "engine":
        config = EngineConfig(max_num_seqs=4, max_queued_requests=4, num_threads=1)
        made = await load_language_model(request.getfixturevalue("checkpoint"), config)
    else:
        made = ScriptedLanguageModel(SCRIPT, max_model_len=512, max_running=4, max_waiting=4)
    yield made
    await made.close()


def ask(prompt: str = "the cat", **sampling: Any) -> GenerateRequest:
    return GenerateRequest(id="r", prompt=TextPrompt(prompt), sampling=SamplingParams(**sampling))


async def read(model: LanguageModel, request: GenerateRequest) -> list[GenerateDelta]:
    return [delta async for delta in model.generate(request)]


def text_of(deltas: list[GenerateDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def ids_of(deltas: list[GenerateDelta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


async def test_every_answer_ends_with_exactly_one_finish_reason(model: LanguageModel) -> None:
    deltas = await read(model, ask(n=3, **LONG | {"max_tokens": 5}))

    for index in range(3):
        mine = [delta for delta in deltas if delta.index == index]
        assert [delta.finish_reason is not None for delta in mine[:-1]] == [False] * (len(mine) - 1)
        assert mine[-1].finish_reason is FinishReason.LENGTH
        assert len(ids_of(deltas, index)) == 5


async def test_the_prompt_comes_first_and_the_timing_last(model: LanguageModel) -> None:
    deltas = await read(model, ask(**LONG | {"max_tokens": 5}))

    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_tokens > 0
    assert deltas[0].prompt.text == "the cat"
    assert all(delta.prompt is None for delta in deltas[1:])
    timing = deltas[-1].timing
    assert timing is not None
    stamps = [
        timing.arrival_ns,
        timing.first_scheduled_ns,
        timing.first_token_ns,
        timing.last_token_ns,
    ]
    assert stamps == sorted(stamps)
    assert all(delta.timing is None for delta in deltas[:-1])


async def test_greedy_answers_repeat(model: LanguageModel) -> None:
    first, second = [await read(model, ask(**LONG | {"max_tokens": 20})) for _ in range(2)]
    assert ids_of(first) == ids_of(second)
    assert text_of(first) == text_of(second)


async def test_a_stop_string_ends_the_text_before_it(model: LanguageModel) -> None:
    whole = text_of(await read(model, ask(**LONG | {"max_tokens": 60})))
    stop = whole[8:11]
    end = whole.index(stop)

    deltas = await read(model, ask(stop=(stop,), **LONG))
    included = await read(model, ask(stop=(stop,), include_stop_str_in_output=True, **LONG))

    assert text_of(deltas) == whole[:end]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == stop
    assert text_of(included) == whole[:end] + stop


async def test_a_stop_token_ends_the_answer_and_is_its_reason(model: LanguageModel) -> None:
    ids = ids_of(await read(model, ask(**LONG | {"max_tokens": 20})))
    stop = ids[3]

    deltas = await read(model, ask(stop_token_ids=(stop,), **LONG))

    assert ids_of(deltas) == ids[: ids.index(stop) + 1]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == stop


async def test_min_tokens_come_before_any_stop_token(model: LanguageModel) -> None:
    ids = ids_of(await read(model, ask(**LONG | {"max_tokens": 2})))

    deltas = await read(model, ask(stop_token_ids=(ids[0],), min_tokens=6, max_tokens=40))

    assert len(ids_of(deltas)) >= 6


async def test_the_answer_ends_where_the_context_does(model: LanguageModel) -> None:
    deltas = await read(model, ask(ignore_eos=True))

    assert deltas[0].prompt is not None
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[0].prompt.num_tokens + len(ids_of(deltas)) == model.max_model_len


async def test_log_probabilities_come_one_per_token(model: LanguageModel) -> None:
    deltas = await read(model, ask(logprobs=2, prompt_logprobs=1, **LONG | {"max_tokens": 4}))

    positions = [position for delta in deltas for position in delta.logprobs]
    assert [position.chosen.token_id for position in positions] == ids_of(deltas)
    for position in positions:
        assert len(position.top) == 2
        assert position.top[0].logprob >= position.top[1].logprob
        assert position.chosen.logprob <= 0
    prompt = deltas[0].prompt
    assert prompt is not None
    assert prompt.logprobs is not None
    assert len(prompt.logprobs) == prompt.num_tokens
    assert prompt.logprobs[0] is None
    assert all(position is not None for position in prompt.logprobs[1:])


async def test_log_probabilities_of_the_prompt_come_once_however_many_answers(
    model: LanguageModel,
) -> None:
    deltas = await read(model, ask(prompt_logprobs=1, n=3, max_tokens=4, ignore_eos=True))

    known = {delta.index: delta.prompt for delta in deltas if delta.prompt is not None}
    assert sorted(known) == [0, 1, 2]
    assert [prompt.logprobs is None for _, prompt in sorted(known.items())] == [False, True, True]


async def test_tokens_and_chats_are_prompts_too(model: LanguageModel) -> None:
    few = SamplingParams(max_tokens=2, ignore_eos=True)
    tokens = GenerateRequest(id="r", prompt=TokensPrompt((5, 6, 7)), sampling=few)
    chat = GenerateRequest(
        id="r", prompt=ChatPrompt(({"role": "user", "content": "hello"},)), sampling=few
    )

    summary = (await read(model, tokens))[0].prompt
    assert summary is not None
    assert summary.num_tokens == 3
    summary = (await read(model, chat))[0].prompt
    assert summary is not None
    assert summary.text is not None
    assert "hello" in summary.text


@pytest.mark.parametrize(
    "prompt", [TextPrompt(""), TokensPrompt(()), TokensPrompt((10**6,)), TokensPrompt((5,) * 512)]
)
async def test_prompts_that_cannot_run_are_refused(
    model: LanguageModel, prompt: TextPrompt | TokensPrompt
) -> None:
    if prompt == TextPrompt("") and isinstance(model, EngineLanguageModel):
        pytest.skip("its tokenizer adds a token to every text")
    with pytest.raises(InvalidRequest):
        await read(model, GenerateRequest(id="r", prompt=prompt))


async def test_closing_the_iterator_frees_its_place(model: LanguageModel) -> None:
    for _ in range(20):  # more than may run and wait together
        stream = model.generate(ask(**LONG))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    assert len(ids_of(await read(model, ask(max_tokens=1)))) == 1


async def test_a_full_queue_refuses_before_the_first_delta_and_serves_the_others(
    model: LanguageModel,
) -> None:
    results = await asyncio.gather(
        *(read(model, ask(**LONG)) for _ in range(16)), return_exceptions=True
    )

    refused = [result for result in results if isinstance(result, BaseException)]
    served = [result for result in results if not isinstance(result, BaseException)]
    assert refused
    assert all(isinstance(error, QueueFull) for error in refused)
    assert len(served) >= 4
    assert all(len(ids_of(deltas)) == 400 for deltas in served)


async def test_closing_the_model_ends_running_answers(
    request: pytest.FixtureRequest, checkpoint: Path
) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: load_language_model(checkpoint, EngineConfig(num_threads=1)),
        lambda: asyncio.sleep(0, ScriptedLanguageModel(SCRIPT, max_model_len=512)),
    ]
    for make in makers:
        model: LanguageModel = await make()
        stream = model.generate(ask(**LONG))
        await anext(stream)
        await model.close()
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        assert not model.is_ready()
        with contextlib.suppress(StopAsyncIteration):
            await anext(stream)
