"""A language model on an engine process: streams, cancellation, names, metrics."""

from __future__ import annotations

import pytest

from naiad.backends.llm.model import EngineLanguageModel
from naiad.core.language import (
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
)
from tests.backends.llm.conftest import MakeModel

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
