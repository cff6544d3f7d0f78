"""The engine says what transformers says: logits at every position, greedy tokens, both layouts.

The cases are in `golden`; on a GPU they run as `tests/gpu/golden_h200.py`.
"""

from __future__ import annotations

import pytest

from tests.engine import golden
from tests.engine.driving import SHAPES, Setup

MAX_ABS_ERROR = 1e-4

SETUPS = [
    Setup(ops=ops, layout=layout) for ops in ("reference", "cpu") for layout in ("pages", "slots")
]
every_setup = pytest.mark.parametrize("setup", SETUPS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_shape
@every_setup
@pytest.mark.parametrize("schedule", golden.SCHEDULES)
def test_logits_equal_those_of_transformers_at_every_position(
    schedule: str, setup: Setup, shape: str
) -> None:
    numbers = golden.logits_case(schedule, shape, setup)

    assert numbers["max_abs_error"] < MAX_ABS_ERROR
    assert numbers["top1_agreement"] == 1
    assert numbers["max_abs_logit"] > 1, "logits near zero would prove nothing"


@every_shape
@every_setup
def test_logits_behind_a_shared_and_copied_prefix_equal_those_of_transformers(
    setup: Setup, shape: str
) -> None:
    numbers = golden.shared_prefix_case(shape, setup)

    assert numbers["max_abs_error"] < MAX_ABS_ERROR


@every_shape
@every_setup
@pytest.mark.parametrize("case", golden.TOKEN_CASES)
def test_tokens_are_those_of_transformers_generate(case: str, setup: Setup, shape: str) -> None:
    numbers = golden.TOKEN_CASES[case](shape, setup)

    assert numbers["num_wrong_tokens"] == 0
    assert numbers["num_tokens"] > 0
    assert numbers["kv_usage_at_end"] == 0
    if case in golden.MUST_HAPPEN:
        assert numbers[golden.MUST_HAPPEN[case]] > 0, "the case did not test what it is about"


@pytest.mark.parametrize("shape", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("setup", [Setup(dtype="bfloat16", ops="cpu", layout="slots")], ids=str)
@pytest.mark.parametrize("schedule", ["prefill", "mixed"])
def test_bf16_is_no_further_from_fp32_than_transformers_in_bf16(
    schedule: str, setup: Setup, shape: str
) -> None:
    numbers = golden.logits_case(schedule, shape, setup)

    assert numbers["relative_error"] < max(0.01, numbers["transformers_relative_error"])


def test_a_forbidden_token_is_never_drawn() -> None:
    numbers = golden.sampling_case("cpu")

    assert numbers["num_forbidden"] == 0
    assert numbers["num_differing"] == 0
