"""Sampling parameters by row: a step gets what its rows need, and nothing where they need nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from naiad.engine.messages import EngineSampling
from naiad.engine.rows import Draw, RowTable
from naiad.engine.sampling import SamplingBatch, uniforms

VOCAB = 50


def table(*ways: dict[str, Any], index: int = 0) -> RowTable:
    rows = RowTable(8, VOCAB, torch.device("cpu"))
    for number, options in enumerate(ways):
        rows.set(
            number,
            EngineSampling(**({"max_tokens": 9, "seed": 0, "temperature": 0.0} | options)),
            index,
        )
    return rows


def batch_of(rows: RowTable, *numbers: int, history: list[int] | None = None) -> SamplingBatch:
    known = history or [1, 2, 3]
    return rows.batch([Draw(number, known, 2) for number in numbers])


def uniform_of(seed: int, position: int) -> float:
    one = uniforms(np.array([seed], dtype=np.uint64), np.array([position], dtype=np.int64))
    return float(one[0, 0])


def test_greedy_rows_need_nothing() -> None:
    batch = batch_of(table({}, {"top_k": 5, "top_p": 0.5}), 0, 1)

    assert batch == SamplingBatch(num_rows=2)


def test_a_step_has_only_the_parameters_that_some_row_needs() -> None:
    rows = table({}, {"temperature": 0.5}, {"temperature": 1.0, "top_k": 3}, {"logprobs": 0})

    plain = batch_of(rows, 1, 0)
    assert plain.temperature is not None
    assert plain.temperature.tolist() == [[0.5], [0.0]]
    assert plain.top_k is plain.top_p is plain.min_p is plain.penalties is plain.bias is None
    assert plain.num_logprobs is None
    mixed = batch_of(rows, 3, 2, 0)
    assert mixed.top_k is not None
    assert mixed.top_k.tolist() == [[0], [3], [0]]
    assert mixed.num_logprobs == 0


def test_the_most_logprobs_of_any_row_are_asked_for() -> None:
    rows = table({"logprobs": 2}, {"logprobs": 7}, {})

    assert batch_of(rows, 0, 2).num_logprobs == 2
    assert batch_of(rows, 0, 1, 2).num_logprobs == 7


def test_minus_one_and_zero_are_all_tokens() -> None:
    rows = table({"temperature": 1.0, "top_k": -1}, {"temperature": 1.0, "top_k": 0})

    assert batch_of(rows, 0, 1).top_k is None


def test_the_random_number_is_of_seed_answer_and_position() -> None:
    first = table({"temperature": 1.0, "seed": 2**64 - 1})
    second = table({"temperature": 1.0, "seed": 2**64 - 1}, index=1)

    drawn = batch_of(first, 0, history=[4, 5, 6, 7]).uniform
    assert drawn is not None
    assert float(drawn[0, 0]) == uniform_of(2**64 - 1, 4)
    drawn = batch_of(second, 0, history=[4]).uniform
    assert drawn is not None
    assert float(drawn[0, 0]) == uniform_of(0, 1), "seed + index, modulo 2^64"


def test_a_row_given_away_forgets_its_parameters() -> None:
    rows = table(
        {"temperature": 1.0, "presence_penalty": 1.0, "logit_bias": {3: 1.0}, "logprobs": 4}
    )

    rows.set(0, EngineSampling(max_tokens=1, seed=0, temperature=0.0), 0)

    assert batch_of(rows, 0) == SamplingBatch(num_rows=1)


def test_histories_are_padded_with_no_token_and_only_penalised_rows_have_one() -> None:
    rows = table({}, {"repetition_penalty": 2.0}, {"frequency_penalty": 0.5})

    batch = rows.batch([Draw(0, [1], 1), Draw(2, [5, 6, 5], 1), Draw(1, [9, 8], 2)])

    penalties = batch.penalties
    assert penalties is not None
    assert penalties.rows.tolist() == [1, 2]
    assert penalties.history.tolist() == [[5, 6, 5], [9, 8, VOCAB]]
    assert penalties.num_prompt.tolist() == [[1], [2]]
    assert penalties.repetition.tolist() == [[1.0], [2.0]]
    assert penalties.frequency.tolist() == [[0.5], [0.0]]
    assert batch.temperature is None


def test_bias_and_masked_stop_tokens_name_their_row_in_the_batch() -> None:
    rows = table(
        {"logit_bias": {7: 1.5, 8: -2.0}},
        {"min_tokens": 2, "stop_token_ids": (4, 5)},
        {"stop_token_ids": (6,)},
    )

    batch = rows.batch([Draw(2, [1], 1), Draw(1, [1, 2], 1), Draw(0, [1], 1)])
    assert batch.bias is not None
    found = list(zip(*(column.tolist() for column in batch.bias), strict=True))
    assert found == [(1, 4, float("-inf")), (1, 5, float("-inf")), (2, 7, 1.5), (2, 8, -2.0)]
    assert batch_of(rows, 1, history=[1, 2, 3, 4]).bias is None, "two tokens were said"


def test_entries_are_read_when_a_row_is_set_and_not_in_every_step() -> None:
    bias = {7: 1.5}
    rows = table({"logit_bias": bias, "stop_token_ids": (4,), "min_tokens": 9})
    bias[8] = 1.0

    for _ in range(2):
        batch = batch_of(rows, 0)
        assert batch.bias is not None
        assert [column.tolist() for column in batch.bias] == [[0, 0], [7, 4], [1.5, float("-inf")]]
