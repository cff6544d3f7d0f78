"""Random op inputs: weights, steps over a dirty cache, and how near a body must come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from naiad.engine.batch import RowInput, StepBatch, build_batch
from naiad.engine.ops.base import Linear, Norm, Target
from naiad.engine.spec import NormSpec

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error against the reference in fp32."""


def target(dtype: torch.dtype, block_tokens: int = 512, max_model_len: int = 512) -> Target:
    return Target(CPU, dtype, block_tokens, max_model_len)


class Random:
    """Seeded tensors of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=self._generator)).to(self._dtype)

    def linear(self, out: int, width: int, *, bias: bool) -> Linear:
        weight = self.normal(out, width, std=width**-0.5)
        return Linear(weight, self.normal(out) if bias else None)

    def norm(self, kind: str, size: int) -> Norm:
        spec = NormSpec(kind, 1e-5)  # type: ignore[arg-type]
        bias = self.normal(size) if kind == "layer" else None
        return Norm(spec, 1 + self.normal(size, std=0.2), bias)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||; NaN anywhere yields NaN, which is below no bound."""
    gap = found.double() - wanted.double()
    return float(gap.norm() / wanted.double().norm().clamp(min=1e-30))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors without values hold NaN: whoever reads one before writing it is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class RowCase:
    """One row: where its context lies, how long it is after the step, how many tokens are new."""

    slot: int
    context: int
    new: int
    samples: bool = True


def slot_batch(rows: Sequence[RowCase], max_model_len: int, places: int) -> StepBatch:
    """A step over slots; decode rows first, by slot, as the engine lays them out."""
    ordered = sorted(rows, key=lambda row: (row.new != 1, row.slot))
    inputs = [
        RowInput([0] * row.new, row.context - row.new, [row.slot], row.samples) for row in ordered
    ]
    batch = build_batch(inputs, max_model_len, CPU)
    batch.block_places = places
    return batch


def dirty_cache(
    random: Random, rows: Sequence[RowCase], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    """`[2, slots, heads, places, dim]`: contexts are random, everything else is large."""
    cache = torch.full((2, *shape), 3e4, dtype=dtype)
    cache[:, ::2] *= -1
    for row in rows:
        known = row.context - row.new
        cache[:, row.slot, :, :known] = random.normal(2, shape[1], known, shape[3])
    return cache
