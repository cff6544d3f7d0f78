"""The contract of `LanguageModel.generate`, on the model that recites."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from naiad.backends.scripted import ScriptedLanguageModel, fail_at, wait_at
from naiad.core.errors import InvalidRequest, QueueFull, Unavailable
from naiad.core.generation import (
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)

SCRIPT = ("one", " two", " three", " four")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ask(text: str = "say", *, priority: int = 0, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        id="r",
        prompt=TextPrompt(text),
        sampling=SamplingParams(**sampling),
        priority=priority,
    )


async def answer(model: ScriptedLanguageModel, request: GenerateRequest) -> list[GenerateDelta]:
    return [delta async for delta in model.generate(request)]


def text(deltas: list[GenerateDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


async def test_each_answer_ends_once_with_its_timing() -> None:
    deltas = await answer(ScriptedLanguageModel(SCRIPT), ask(n=2))

    for index in range(2):
        mine = [delta for delta in deltas if delta.index == index]
        assert text(mine, index) == "".join(SCRIPT)
        assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["stop"]
        assert mine[-1].finish_reason is FinishReason.STOP
        timing = mine[-1].timing
        assert timing is not None
        assert timing.arrival_ns <= timing.first_scheduled_ns <= timing.first_token_ns
        assert timing.first_token_ns <= timing.last_token_ns
        assert mine[0].prompt is not None
        assert all(delta.prompt is None for delta in mine[1:])


async def test_limits_end_an_answer_with_length() -> None:
    short = await answer(ScriptedLanguageModel(SCRIPT), ask(max_tokens=2))
    full = await answer(ScriptedLanguageModel(SCRIPT, max_model_len=4), ask("a", ignore_eos=True))

    assert (text(short), short[-1].finish_reason) == ("one two", "length")
    assert (text(full), full[-1].finish_reason) == ("one two three", "length")


async def test_a_stop_string_across_tokens_never_shows() -> None:
    deltas = await answer(ScriptedLanguageModel(SCRIPT), ask(stop=("o thr", "never")))
    shown = await answer(
        ScriptedLanguageModel(SCRIPT), ask(stop=("o thr",), include_stop_str_in_output=True)
    )

    assert text(deltas) == "one tw"
    assert deltas[-1].stop_reason == "o thr"
    assert text(shown) == "one two thr"


async def test_a_stop_token_and_min_tokens() -> None:
    stopped = await answer(ScriptedLanguageModel(SCRIPT), ask(stop_token_ids=(2,)))
    longer = await answer(ScriptedLanguageModel(SCRIPT), ask(min_tokens=6, max_tokens=9))

    assert (text(stopped), stopped[-1].stop_reason) == ("one two", 2)
    assert sum(len(delta.token_ids) for delta in longer) == 7


async def test_log_probabilities_come_with_each_token() -> None:
    deltas = await answer(ScriptedLanguageModel(SCRIPT), ask(logprobs=2, prompt_logprobs=1))

    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    assert [token.token for token in deltas[0].logprobs[0].top] == ["one", " two"]
    prompt = deltas[0].prompt
    assert prompt is not None
    assert prompt.logprobs == (None,)


@pytest.mark.parametrize(
    "prompt", [TextPrompt(" "), TokensPrompt(()), TokensPrompt((-1,)), TextPrompt("a " * 99)]
)
async def test_a_prompt_that_cannot_be_continued_is_invalid(
    prompt: TextPrompt | TokensPrompt,
) -> None:
    with pytest.raises(InvalidRequest):
        await answer(
            ScriptedLanguageModel(SCRIPT, max_model_len=50), GenerateRequest(id="", prompt=prompt)
        )


async def test_the_queue_is_bounded_and_serves_by_priority() -> None:
    go_on = asyncio.Event()
    model = ScriptedLanguageModel(
        SCRIPT, max_running=1, max_waiting=2, before_token=wait_at(0, go_on)
    )
    order: list[int] = []

    async def run(priority: int) -> None:
        await answer(model, ask(priority=priority))
        order.append(priority)

    tasks = []
    for priority in (0, 5, 1):
        tasks.append(asyncio.create_task(run(priority)))
        await model.until(lambda: model.num_running + model.num_waiting == len(tasks))
    with pytest.raises(QueueFull) as caught:
        await answer(model, ask())
    go_on.set()
    await asyncio.gather(*tasks)

    assert caught.value.facts == {"limit": 2, "retry_after_s": 1}
    assert order == [0, 1, 5]
    assert (model.num_running, model.num_waiting, model.num_finished) == (0, 0, 3)


@pytest.mark.parametrize("waiting", [False, True])
async def test_a_cancelled_request_frees_its_place(waiting: bool) -> None:
    go_on = asyncio.Event()
    model = ScriptedLanguageModel(SCRIPT, max_running=1, before_token=wait_at(0, go_on))
    tasks = [asyncio.create_task(answer(model, ask())) for _ in range(2)]
    await model.until(lambda: model.num_waiting == 1)
    tasks[waiting].cancel()
    await model.until(lambda: model.num_cancelled == 1)
    go_on.set()

    assert len(await tasks[not waiting]) == len(SCRIPT) + 1
    assert model.num_running == 0


async def test_it_fails_midway_when_told_to() -> None:
    model = ScriptedLanguageModel(SCRIPT, before_token=fail_at(1, Unavailable("gone")))
    deltas = model.generate(ask())

    assert (await anext(deltas)).text == "one"
    with pytest.raises(Unavailable, match="gone"):
        await anext(deltas)
    assert (model.num_running, model.num_cancelled, model.num_finished) == (0, 0, 0)
