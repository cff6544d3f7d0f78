"""Picks a body for each op of a model: the first in the list that accepts it.

The reference bodies are always last, so that every model runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from naiad.engine.ops import cpu, reference
from naiad.engine.ops.base import (
    Embed,
    Linear,
    LinearResidual,
    Logits,
    Norm,
    NormLinear,
    RopeWriteAttend,
    Target,
)
from naiad.engine.spec import Activation, AttentionSpec

T = TypeVar("T")
ALL = {bodies.name: bodies for bodies in (cpu.BODIES, reference.BODIES)}


class OpTable:
    """The bodies to ask, best first. `prefer` is "auto", or one of `ALL`."""

    def __init__(self, prefer: str, to: Target) -> None:
        names = ["reference"] if prefer == "reference" else [*_fast(prefer, to), "reference"]
        self._bodies = [ALL[name] for name in names]
        self.to = to

    def embed(self, table: torch.Tensor, positions: torch.Tensor | None) -> Embed:
        """A prepared `Embed`."""
        made = (b.embed.prepare(table, positions, self.to) for b in self._bodies if b.embed)
        return _first(made)

    def norm_linear(
        self, norm: Norm, linear: Linear, activation: Activation | None, *, gated: bool
    ) -> NormLinear:
        """A prepared `NormLinear`."""
        kinds = (b.norm_linear for b in self._bodies if b.norm_linear)
        return _first(kind.prepare(norm, linear, activation, gated, self.to) for kind in kinds)

    def attend(self, spec: AttentionSpec) -> RopeWriteAttend:
        """A prepared `RopeWriteAttend`; layers of one spec share it."""
        return _first(b.attend.prepare(spec, self.to) for b in self._bodies if b.attend)

    def linear_residual(self, linear: Linear) -> LinearResidual:
        """A prepared `LinearResidual`."""
        kinds = (b.linear_residual for b in self._bodies if b.linear_residual)
        return _first(kind.prepare(linear, self.to) for kind in kinds)

    def logits(self, norm: Norm, head: torch.Tensor) -> Logits:
        """A prepared `Logits`."""
        return _first(b.logits.prepare(norm, head, self.to) for b in self._bodies if b.logits)

    def tune(self, project: Callable[[int], None]) -> None:
        """Let bodies measure what is best on this machine; see `ops.cpu.tune`."""
        if any(bodies is cpu.BODIES for bodies in self._bodies):
            cpu.tune(project)


def _fast(prefer: str, to: Target) -> list[str]:
    """Names of the bodies made for the target's device."""
    return [name for name in ALL if name == to.device.type and prefer in ("auto", name)]


def _first(candidates: Iterator[T | None]) -> T:
    """The first body that accepted; the reference ones always do. Later ones are not prepared."""
    return next(body for body in candidates if body is not None)
