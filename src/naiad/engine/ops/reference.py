"""Every op in plain torch, on any device and dtype: the specification of the others.

Written to be read and trusted, not to be fast: attention goes row by row in fp32.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F

from naiad.engine.batch import RowSpan, StepBatch
from naiad.engine.ops.base import Bodies, Linear, Norm, Target
from naiad.engine.spec import Activation, AttentionSpec, RopeSpec


def normalise(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Root-mean-square or layer norm over the last dimension, computed in fp32."""
    size = (x.shape[-1],)
    if norm.spec.kind == "rms":
        return F.rms_norm(x, size, norm.weight, norm.spec.eps)
    return F.layer_norm(x, size, norm.weight, norm.bias, norm.spec.eps)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The named activation, elementwise."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)


def finish(y: torch.Tensor, activation: Activation | None, gated: bool) -> torch.Tensor:
    """What follows a projection in `NormLinear`: nothing, an activation, or a gated one."""
    if activation is None:
        return y
    if not gated:
        return activate(y, activation)
    gate, up = y.chunk(2, dim=-1)
    return activate(gate, activation) * up


def rope_table(spec: RopeSpec, head_dim: int, length: int, to: Target) -> torch.Tensor:
    """`[2, length, head_dim]`: cosines, and sines with the sign that `rotate` expects."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), spec.theta**-exponent)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    return table.to(dtype=to.dtype, device=to.device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[tokens, heads, head_dim]` by `cos`, `sin` `[tokens, 1, head_dim]`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class ReferenceEmbed:
    """`Embed` by indexing."""

    def __init__(self, table: torch.Tensor, positions: torch.Tensor | None) -> None:
        self._table, self._positions = table, positions

    @classmethod
    def prepare(cls, table: torch.Tensor, positions: torch.Tensor | None, to: Target) -> Self:
        return cls(
            table.to(to.device, to.dtype),
            None if positions is None else positions.to(to.device, to.dtype),
        )

    def run(self, batch: StepBatch) -> torch.Tensor:
        x = F.embedding(batch.tokens, self._table)
        if self._positions is None:
            return x
        return x + F.embedding(batch.positions, self._positions)


class ReferenceNormLinear:
    """`NormLinear` in three calls."""

    def __init__(
        self, norm: Norm, linear: Linear, activation: Activation | None, gated: bool
    ) -> None:
        self._norm, self._linear = norm, linear
        self._activation, self._gated = activation, gated

    @classmethod
    def prepare(
        cls, norm: Norm, linear: Linear, activation: Activation | None, gated: bool, to: Target
    ) -> Self:
        return cls(norm_to(norm, to), linear_to(linear, to), activation, gated)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(normalise(x, self._norm), self._linear.weight, self._linear.bias)
        return finish(y, self._activation, self._gated)


class ReferenceRopeWriteAttend:
    """`RopeWriteAttend` row by row, in fp32, over both cache layouts."""

    def __init__(self, spec: AttentionSpec, to: Target) -> None:
        self._spec = spec
        self._rope = (
            rope_table(spec.rope, spec.head_dim, to.max_model_len, to) if spec.rope else None
        )

    @classmethod
    def prepare(cls, spec: AttentionSpec, to: Target) -> Self:
        return cls(spec, to)

    def plan(self, batch: StepBatch) -> StepBatch:
        return batch

    def run(
        self,
        qkv: torch.Tensor,
        cache: torch.Tensor,
        plan: StepBatch,
        *,
        sampled_only: bool = False,
    ) -> torch.Tensor:
        spec = self._spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        tokens = qkv[: plan.num_tokens].view(plan.num_tokens, -1, spec.head_dim)
        q, k, v = tokens.split([heads, kv_heads, kv_heads], 1)
        if self._rope is not None:
            cos, sin = self._rope[:, plan.positions].unsqueeze(2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache[0][plan.write_blocks, :, plan.write_offsets] = k
        cache[1][plan.write_blocks, :, plan.write_offsets] = v
        out = torch.zeros(qkv.shape[0], heads, spec.head_dim, dtype=qkv.dtype, device=qkv.device)
        for row in plan.rows:
            span = slice(row.first, row.first + row.num_tokens)
            out[span] = self._attend(q[span], cache, row)
        return out.reshape(qkv.shape[0], spec.q_size)

    def _attend(self, q: torch.Tensor, cache: torch.Tensor, row: RowSpan) -> torch.Tensor:
        """`q` `[new, heads, head_dim]` over the row's whole context."""
        spec, context = self._spec, row.context_tokens
        block_tokens = cache.shape[3]
        blocks = list(row.blocks[: -(-context // block_tokens)])
        # [2, blocks, kv_heads, block_tokens, dim] -> [2, kv_heads, context, dim]
        kv = cache[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :context].float()
        kv = kv.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)
        scores = (q.float().transpose(0, 1) @ kv[0].mT) * spec.scale
        new = torch.arange(context - row.num_tokens, context, device=q.device)
        future = torch.arange(context, device=q.device) > new[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ kv[1]).transpose(0, 1).to(q.dtype)


class ReferenceLinearResidual:
    """`LinearResidual` in two calls."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    @classmethod
    def prepare(cls, linear: Linear, to: Target) -> Self:
        return cls(linear_to(linear, to))

    def run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + F.linear(x, self._linear.weight, self._linear.bias)


class ReferenceLogits:
    """`Logits` in two calls."""

    def __init__(self, norm: Norm, head: torch.Tensor) -> None:
        self._norm, self._head = norm, head

    @classmethod
    def prepare(cls, norm: Norm, head: torch.Tensor, to: Target) -> Self:
        return cls(norm_to(norm, to), head.to(to.device, to.dtype))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(normalise(x, self._norm), self._head)


def norm_to(norm: Norm, to: Target) -> Norm:
    """The norm's weights where and as the model runs."""
    bias = None if norm.bias is None else norm.bias.to(to.device, to.dtype)
    return Norm(norm.spec, norm.weight.to(to.device, to.dtype), bias)


def linear_to(linear: Linear, to: Target) -> Linear:
    """The projection's weights where and as the model runs."""
    bias = None if linear.bias is None else linear.bias.to(to.device, to.dtype)
    return Linear(linear.weight.to(to.device, to.dtype), bias)


BODIES = Bodies(
    "reference",
    embed=ReferenceEmbed,
    norm_linear=ReferenceNormLinear,
    attend=ReferenceRopeWriteAttend,
    linear_residual=ReferenceLinearResidual,
    logits=ReferenceLogits,
)
