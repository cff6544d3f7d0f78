"""Rotation, cache write and attention: every body against the reference, over a dirty cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naiad.engine.batch import RowInput, RowSpan, build_batch
from naiad.engine.ops.cpu import CpuRopeWriteAttend, decode_groups
from naiad.engine.ops.reference import ReferenceRopeWriteAttend, rope_table, rotate
from naiad.engine.spec import AttentionSpec, RopeSpec
from tests.engine.ops.cases import (
    BOUNDS,
    CPU,
    Random,
    RowCase,
    dirty_cache,
    poisoned_memory,
    relative_error,
    slot_batch,
    target,
)

MAX_LEN = 512
NUM_SLOTS = 10
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def attention(kv_heads: int, per_head: int, dim: int, *, rope: bool = True) -> AttentionSpec:
    rope_spec = RopeSpec(10_000.0) if rope else None
    return AttentionSpec(kv_heads * per_head, kv_heads, dim, dim**-0.5, rope_spec)


def check(
    spec: AttentionSpec,
    rows: list[RowCase],
    dtype: torch.dtype,
    *,
    places: int = 0,
    num_padding: int = 0,
    overhead_places: int | None = None,
    sampled_only: bool = False,
) -> None:
    """Run the CPU body and the reference (in fp32) on the same step; compare answers and caches."""
    places = places or max(row.context for row in rows)
    random = Random(len(rows) + places, dtype)
    batch = slot_batch(rows, MAX_LEN, places)
    cache = dirty_cache(random, rows, (NUM_SLOTS, spec.num_kv_heads, places, spec.head_dim), dtype)
    qkv = random.normal(batch.num_tokens + num_padding, spec.qkv_size)
    qkv[batch.num_tokens :] = float("nan")
    reference_cache = cache.float().clone()
    reference_qkv = qkv[: batch.num_tokens].float().clone()
    body = CpuRopeWriteAttend.prepare(spec, target(dtype, MAX_LEN, MAX_LEN))
    if body is None:
        pytest.skip(f"no CPU body for {dtype} here")
    if overhead_places is not None:
        body._overhead_places = overhead_places

    found = body.run(qkv, cache, body.plan(batch), sampled_only=sampled_only)

    specification = ReferenceRopeWriteAttend.prepare(spec, target(torch.float32, MAX_LEN, MAX_LEN))
    plan = specification.plan(batch)
    wanted = specification.run(reference_qkv, reference_cache, plan)
    assert found.shape == (batch.num_tokens + num_padding, spec.q_size)
    read = batch.sampled if sampled_only else torch.arange(batch.num_tokens)
    for token in read.tolist():
        assert relative_error(found[token], wanted[token]) < 2 * BOUNDS[dtype]
    assert relative_error(cache, reference_cache) < BOUNDS[dtype]
    for row in rows:
        known = row.context - row.new
        before, after = reference_cache[:, row.slot, :, :known], cache[:, row.slot, :, :known]
        assert torch.equal(before, after.float()), "what was there is not touched"


@st.composite
def row_cases(draw: st.DrawFn) -> list[RowCase]:
    """Decode rows and prefill chunks in any slots, holes between them, contexts of any length."""
    slots = draw(st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=8, unique=True))
    rows = []
    for slot in slots:
        new = draw(st.one_of(st.just(1), st.just(1), st.integers(2, 40)))
        context = new + draw(st.one_of(st.just(0), st.integers(0, 60)))
        rows.append(RowCase(slot, context, new, draw(st.booleans())))
    return rows


@every_dtype
@given(
    rows=row_cases(),
    spec=st.builds(
        attention,
        st.integers(1, 3),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([8, 16, 32]),
        rope=st.booleans(),
    ),
    more_places=st.sampled_from([0, 1, 70, 300]),
    num_padding=st.integers(0, 2),
    overhead_places=st.sampled_from([None, 0, 20]),
    sampled_only=st.booleans(),
)
@settings(max_examples=80)
def test_any_step_is_that_of_the_reference(
    dtype: torch.dtype,
    rows: list[RowCase],
    spec: AttentionSpec,
    more_places: int,
    num_padding: int,
    overhead_places: int | None,
    sampled_only: bool,
) -> None:
    places = max(row.context for row in rows) + more_places
    check(
        spec,
        rows,
        dtype,
        places=places,
        num_padding=num_padding,
        overhead_places=overhead_places,
        sampled_only=sampled_only,
    )


@every_dtype
@pytest.mark.parametrize("new", [127, 128, 129, 300])
@pytest.mark.parametrize("before", [0, 1, 100])
def test_a_long_chunk_goes_by_blocks_of_queries(dtype: torch.dtype, before: int, new: int) -> None:
    check(attention(2, 2, 16), [RowCase(3, before + new, new)], dtype, places=450)


@every_dtype
@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("places", [0, 96, 400])
def test_ragged_neighbours_decode_together(dtype: torch.dtype, num_rows: int, places: int) -> None:
    rows = [RowCase(slot, 1 + 10 * (slot * 7 % 10), 1) for slot in range(num_rows)]
    check(attention(2, 3, 16), rows, dtype, places=places)


def test_equal_lengths_that_fill_their_slots_need_no_mask() -> None:
    rows = [RowCase(slot, 64, 1) for slot in range(8)]
    check(attention(2, 2, 16), rows, torch.float32, places=64)


def test_a_decode_row_beside_padding_ignores_it() -> None:
    check(attention(2, 2, 16), [RowCase(0, 30, 1)], torch.float32, num_padding=3)


def test_the_slot_body_leaves_pages_to_the_reference() -> None:
    assert CpuRopeWriteAttend.prepare(attention(2, 2, 16), target(torch.float32, 64, 512)) is None


# ---------------------------------------------------------------- the reference itself


def test_pages_in_any_order_are_the_same_as_one_slot() -> None:
    """The reference over both layouts, dirty places behind the contexts."""
    spec, random = attention(2, 2, 8), Random(0)
    body = ReferenceRopeWriteAttend.prepare(spec, target(torch.float32, 64, 64))
    history = random.normal(2, 2, 40, 8)
    qkv = random.normal(7, spec.qkv_size)
    slots = torch.full((2, 2, 2, 64, 8), 3e4)
    slots[:, 1, :, :40] = history
    pages = torch.full((2, 9, 2, 8, 8), -3e4)
    table = [4, 0, 8, 2, 6, 3]
    for number in range(5):
        pages[:, table[number]] = history[:, :, number * 8 :][:, :, :8]

    found = []
    for cache, blocks, size in ((slots, [1], 64), (pages, table, 8)):
        batch = build_batch([RowInput([0] * 7, 40, blocks, samples=True)], size, CPU)
        found.append(body.run(qkv.clone(), cache, body.plan(batch)))

    assert torch.equal(found[0], found[1])
    assert torch.equal(slots[:, 1, :, 40:47], torch.cat([pages[:, 3, :, :7]], 2))


def test_attention_is_the_softmax_of_scores_over_the_past() -> None:
    spec = AttentionSpec(2, 1, 4, scale=0.7)
    body = ReferenceRopeWriteAttend.prepare(spec, target(torch.float32, 16, 16))
    qkv = Random(0).normal(5, spec.qkv_size)
    q, k, v = qkv.view(5, 4, 4).split([2, 1, 1], 1)
    batch = build_batch([RowInput([0] * 5, 0, [0], samples=True)], 16, CPU)

    found = body.run(qkv.clone(), torch.zeros(2, 1, 1, 16, 4), body.plan(batch)).view(5, 2, 4)

    for position in range(5):
        for head in range(2):
            past = slice(position + 1)
            weights = (k[past, 0] @ q[position, head] * 0.7).softmax(0)
            torch.testing.assert_close(found[position, head], weights @ v[past, 0])


def test_rotation_is_a_turn_of_pairs_by_their_angle() -> None:
    spec = RopeSpec(100.0)
    cos, sin = rope_table(spec, 4, 10, target(torch.float32))
    x = Random(0).normal(1, 1, 4)

    found = rotate(x, cos[7], sin[7])[0, 0]

    for pair, speed in ((0, 1.0), (1, 0.1)):
        turned = torch.complex(x[0, 0, pair], x[0, 0, pair + 2]) * torch.exp(
            torch.tensor(1j * 7 * speed)
        )
        torch.testing.assert_close(found[pair], turned.real)
        torch.testing.assert_close(found[pair + 2], turned.imag)


# ---------------------------------------------------------------- decode groups, pure


@given(
    slots=st.lists(st.integers(0, 30), min_size=1, max_size=20, unique=True),
    overhead=st.integers(0, 500),
    data=st.data(),
)
def test_groups_hold_every_row_once_and_cross_no_hole(
    slots: list[int], overhead: int, data: st.DataObject
) -> None:
    rows = [
        RowSpan(number, 1, data.draw(st.integers(1, 300)), [slot], samples=True)
        for number, slot in enumerate(sorted(slots))
    ]

    groups = decode_groups(rows, overhead)

    covered = [number for group in groups for number in range(group.first, group.last)]
    assert covered == list(range(len(rows)))
    for group in groups:
        members = rows[group.first : group.last]
        assert [row.blocks[0] for row in members] == [
            group.slot + number for number in range(group.num_rows)
        ]
        longest = max(row.context_tokens for row in members)
        assert group.context_tokens == longest
        wasted = longest * group.num_rows - sum(row.context_tokens for row in members)
        assert wasted <= overhead, "padding costs no more than another group"


def test_an_expensive_group_takes_all_neighbours_and_a_free_one_only_equals() -> None:
    rows = [RowSpan(n, 1, length, [n], samples=True) for n, length in enumerate([10, 10, 300, 10])]

    assert [g.num_rows for g in decode_groups(rows, 10_000)] == [4]
    assert [g.num_rows for g in decode_groups(rows, 0)] == [2, 1, 1]
    assert decode_groups([], 5) == []
