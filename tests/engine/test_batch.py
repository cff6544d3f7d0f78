"""Rows laid out flat: every token knows its position and the place of its keys and values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naiad.engine.batch import RowInput, build_batch

CPU = torch.device("cpu")


def test_a_decode_row_and_a_chunk_across_a_page_border() -> None:
    batch = build_batch(
        [
            RowInput([7], 5, [3, 1], samples=True),
            RowInput([8, 9, 10], 3, [2, 0], samples=False),
            RowInput([11, 12], 0, [4], samples=True),
        ],
        4,
        CPU,
    )

    assert batch.tokens.tolist() == [7, 8, 9, 10, 11, 12]
    assert batch.positions.tolist() == [5, 3, 4, 5, 0, 1]
    assert batch.write_blocks.tolist() == [1, 2, 0, 0, 4, 4]
    assert batch.write_offsets.tolist() == [1, 3, 0, 1, 0, 1]
    assert batch.sampled.tolist() == [0, 5], "the last token of each row that samples"
    assert (batch.num_tokens, batch.num_decode_rows, batch.block_places) == (6, 1, 4)
    spans = [(row.first, row.num_tokens, row.context_tokens) for row in batch.rows]
    assert spans == [(0, 1, 6), (1, 3, 6), (4, 2, 2)]


def test_a_step_that_draws_nothing_has_no_sampled_tokens() -> None:
    batch = build_batch([RowInput([1, 2], 0, [0], samples=False)], 8, CPU)

    assert batch.sampled.shape == (0,)
    assert batch.sampled.dtype == torch.int64


@st.composite
def row_inputs(draw: st.DrawFn) -> list[RowInput]:
    lengths = [1] * draw(st.integers(0, 4)) + draw(st.lists(st.integers(2, 20), max_size=4))
    rows = []
    for length in lengths or [1]:
        start = draw(st.integers(0, 30))
        blocks = draw(st.lists(st.integers(0, 99), min_size=20, max_size=20))
        ids = draw(st.lists(st.integers(0, 511), min_size=length, max_size=length))
        rows.append(RowInput(ids, start, blocks, draw(st.booleans())))
    return rows


@given(rows=row_inputs(), block_tokens=st.integers(3, 64))
@settings(max_examples=50)
def test_every_token_is_where_a_loop_would_put_it(rows: list[RowInput], block_tokens: int) -> None:
    batch = build_batch(rows, block_tokens, CPU)

    wanted = []
    for row in rows:
        for number, token in enumerate(row.token_ids):
            block, offset = divmod(row.start + number, block_tokens)
            wanted.append((token, row.start + number, row.blocks[block], offset))
    columns = (batch.tokens, batch.positions, batch.write_blocks, batch.write_offsets)
    assert list(zip(*(one.tolist() for one in columns), strict=True)) == wanted
    assert batch.num_decode_rows == sum(len(row.token_ids) == 1 for row in rows)
    assert len(batch.sampled) == sum(row.samples for row in rows)
