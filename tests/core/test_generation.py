"""What the records of `generate` refuse, whoever makes them."""

from __future__ import annotations

import msgspec
import pytest

from naiad.core.errors import InvalidRequest
from naiad.core.generation import GenerateRequest, SamplingParams, TextPrompt


@pytest.mark.parametrize("priority", [-100, 0, 100])
def test_a_priority_may_be_anything_that_waiting_can_make_up_for(priority: int) -> None:
    request = GenerateRequest(id="r", prompt=TextPrompt("a"), priority=priority)

    assert request.priority == priority


@pytest.mark.parametrize("priority", [-101, 101, -(2**31), int(1e30)])
def test_a_priority_that_would_starve_the_others_is_refused(priority: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"priority {priority} .* -100 to 100"):
        GenerateRequest(id="r", prompt=TextPrompt("a"), priority=priority)


@pytest.mark.parametrize("value", [0.0, 1e-40, 0.009, 100.1])
def test_a_repetition_penalty_that_overflows_logits_is_refused(value: float) -> None:
    with pytest.raises(msgspec.ValidationError, match="repetition_penalty"):
        msgspec.convert({"repetition_penalty": value}, SamplingParams)
