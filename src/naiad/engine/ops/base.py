"""The operations of a decoder, each a contract with several bodies.

An op is as wide as the widest kernel that will implement it (norm + projection, rotation + cache write +
attention, projection + residual). A body is made once per layer by `prepare`, which packs the weights
as it likes, and is then `run` every step. `ops.reference` is plain torch, handles everything and is the
specification; other bodies say what they accept, and the table (`ops.table`) asks the next one
otherwise. Nothing but the decoder calls a body, and bodies do not call each other.

Shapes: `tokens` is the flat token count of a step. Activations are of the model's dtype. `Embed` may add
padding rows at the end (a body may be faster with more rows); every op carries them along unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from naiad.engine.batch import StepBatch
from naiad.engine.spec import Activation, AttentionSpec, NormSpec


@dataclass(frozen=True, slots=True)
class Target:
    """Where and in which type a model runs."""

    device: torch.device
    dtype: torch.dtype
    block_tokens: int
    """Places of one KV block."""
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Norm:
    """Weights of a normalisation; `bias` only for layer norm."""

    spec: NormSpec
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`, weight `[out, in]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class Embed(Protocol):
    """Token ids to the residual stream, plus learned positions where the model has them."""

    @classmethod
    def prepare(
        cls, table: torch.Tensor, positions: torch.Tensor | None, to: Target
    ) -> Self | None:
        """Pack `table` `[vocab, hidden]` and `positions` `[positions, hidden]`."""

    def run(self, batch: StepBatch) -> torch.Tensor:
        """`[tokens or more, hidden]`."""


class NormLinear(Protocol):
    """Normalise, project; then the activation, if any.

    With `gated`, the projection's rows are gate then up, and the result is `act(gate) * up`.
    """

    @classmethod
    def prepare(
        cls, norm: Norm, linear: Linear, activation: Activation | None, gated: bool, to: Target
    ) -> Self | None:
        """Pack; None if this body does not accept the combination."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` to `[tokens, out]`, or half of `out` if gated; `x` is only read."""


class RopeWriteAttend(Protocol):
    """Rotate queries and keys, write keys and values to the cache, attend over the cache."""

    @classmethod
    def prepare(cls, spec: AttentionSpec, to: Target) -> Self | None:
        """None if this body does not accept the attention or the cache's layout."""

    def plan(self, batch: StepBatch) -> Any:
        """What every layer of this spec needs of the step, computed once per step."""

    def run(
        self, qkv: torch.Tensor, cache: torch.Tensor, plan: Any, *, sampled_only: bool = False
    ) -> torch.Tensor:
        """Attend causally over each row's own context.

        Args:
            qkv: `[tokens, q_size + 2 * kv_size]`; may be overwritten.
            cache: One layer, `[2, blocks, kv_heads, block_tokens, head_dim]`; the step's keys and
                values are written into it first. Places beyond a row's context hold old values or
                zeros, always finite, that must not matter.
            plan: From `plan` for this step.
            sampled_only: Only the tokens in `batch.sampled` will be read; the others need not be
                computed. Keys and values are written for all.

        Returns:
            `[tokens, q_size]`.
        """


class LinearResidual(Protocol):
    """Project and add to the residual stream."""

    @classmethod
    def prepare(cls, linear: Linear, to: Target) -> Self | None:
        """Pack the weight `[hidden, in]`."""

    def run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + x @ weight.T + bias`, `[tokens, hidden]`; `residual` may be overwritten."""


class Logits(Protocol):
    """Final norm and head. Sampling follows in `engine.sampling`, the same for every body."""

    @classmethod
    def prepare(cls, norm: Norm, head: torch.Tensor, to: Target) -> Self | None:
        """Pack the head `[vocab, hidden]`."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden]` to `[rows, vocab]`, of the model's dtype."""


@dataclass(frozen=True, slots=True)
class Bodies:
    """One implementation's body for each op, None where it has none."""

    name: str
    embed: type[Embed] | None = None
    norm_linear: type[NormLinear] | None = None
    attend: type[RopeWriteAttend] | None = None
    linear_residual: type[LinearResidual] | None = None
    logits: type[Logits] | None = None
