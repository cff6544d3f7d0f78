"""Short prompts that begin together attend together, and as they would alone."""

import random

import pytest
import torch

from naiad.engine.batch import RowInput, RowSpan, build_batch
from naiad.engine.ops import cpu, reference
from naiad.engine.ops.base import Target
from naiad.engine.spec import AttentionSpec, RopeSpec

PLACES = 512
TARGET = Target(torch.device("cpu"), torch.float32, PLACES, PLACES)


def span(num_tokens: int, before: int = 0) -> RowSpan:
    return RowSpan(0, num_tokens, before + num_tokens, [0], samples=True)


def lengths(groups: list[list[RowSpan]]) -> list[list[int]]:
    return [[row.num_tokens for row in group] for group in groups]


def test_prompts_of_similar_length_form_a_group_and_the_rest_go_alone() -> None:
    rows = [span(100), span(20), span(90), span(80, before=16), span(300)]

    groups, alone = cpu.fresh_groups(rows)

    assert lengths(groups) == [[100, 90]]
    assert sorted(row.num_tokens for row in alone) == [20, 80, 300]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rope"), [(12, 4, True), (4, 4, False), (8, 1, True)]
)
def test_groups_give_what_the_reference_gives(
    heads: int, kv_heads: int, rope: bool, seed: int
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    spec = AttentionSpec(heads, kv_heads, 16, 0.25, RopeSpec(10_000.0) if rope else None)
    body = cpu.CpuRopeWriteAttend.prepare(spec, TARGET)
    assert body is not None
    model = reference.ReferenceRopeWriteAttend.prepare(spec, TARGET)
    rows = [RowInput([1], 40 + number, [number], True) for number in range(2)]
    for slot in range(2, 10):
        count, before = rng.choice([2, 60, 64, 70, 128, 200, 256, 300]), rng.choice([0, 0, 0, 33])
        rows.append(RowInput([1] * count, before, [slot], True))
    batch = build_batch(rows, PLACES, TARGET.device)
    ours = torch.randn(2, 12, kv_heads, PLACES, 16)
    theirs, last = ours.clone(), ours.clone()
    qkv = torch.randn(batch.num_tokens, spec.qkv_size)
    expected = model.run(qkv.clone(), theirs, model.plan(batch))

    plan = body.plan(batch)
    assert plan.fresh
    torch.testing.assert_close(body.run(qkv.clone(), ours, plan), expected)
    torch.testing.assert_close(ours, theirs)
    sampled = body.run(qkv.clone(), last, plan, sampled_only=True)[batch.sampled]
    torch.testing.assert_close(sampled, expected[batch.sampled])
