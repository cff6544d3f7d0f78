"""Op bodies for CPUs: prepacked oneDNN projections and batched attention over contiguous slots.

Why these: `F.linear` repacks its weight at every call and reads at half the bandwidth of a prepacked
one; oneDNN reads weights fastest with two rows or four, depending on the machine, so a step of one token
carries padding rows; scaled dot product attention is a trap in decode beyond a few small rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from naiad.engine.batch import RowSpan, StepBatch
from naiad.engine.ops.base import Bodies, Linear, Norm, Target
from naiad.engine.ops.reference import ReferenceEmbed, finish, norm_to, normalise, rope_table
from naiad.engine.spec import Activation, AttentionSpec

ROW_CHOICES = (2, 1, 4)
"""How many rows a step of one token may be padded to; the first wins ties (see `tune`)."""

TUNING_ROUNDS = 6

QUERY_BLOCK = 128
"""Query tokens of one prefill attention block: scores stay in cache, few masked places computed."""

FRESH_TOKENS = 256
"""Prompts up to this long attend together; at least `QUERY_BLOCK`."""

GROUP_OVERHEAD_BYTES = 400_000
"""Reading this many bytes of keys and values costs as much as one more batched product."""

SDPA_HEADS, SDPA_PLACES = 8, 256
"""Up to this many key heads of this many places, one fused call beats three."""

_FUSED_ACTIVATIONS: dict[Activation, tuple[str, str]] = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


def _packs(to: Target) -> bool:
    """Whether this machine's oneDNN multiplies in the target's dtype at full speed."""
    if not torch.backends.mkldnn.is_available():
        return False
    match to.dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


class Padding:
    """The fewest rows that projections of one model are called with; set by `tune`."""

    def __init__(self) -> None:
        self.rows = ROW_CHOICES[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with zero rows added up to the minimum."""
        missing = self.rows - x.shape[0]
        return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


PADDING = Padding()
"""A property of the machine, so one for the process."""


def tune(project: Callable[[int], None]) -> None:
    """Measure which number of rows this machine's oneDNN is fastest at, once the weights are packed.

    Args:
        project: Runs projections of the model, more than fit into the processor's cache, with this
            many rows.
    """
    seconds = dict.fromkeys(ROW_CHOICES, float("inf"))
    for _ in range(TUNING_ROUNDS):  # in turn, so that a disturbance hits all of them
        for rows in ROW_CHOICES:
            seconds[rows] = min(seconds[rows], _timed(project, rows))
    PADDING.rows = min(seconds, key=lambda rows: seconds[rows])


def _timed(project: Callable[[int], None], rows: int) -> float:
    start = time.perf_counter()
    project(rows)
    return time.perf_counter() - start


class PackedLinear:
    """A projection in oneDNN's own weight layout."""

    def __init__(self, linear: Linear, to: Target) -> None:
        weight = linear.weight.to(to.dtype).contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = None if linear.bias is None else linear.bias.to(to.dtype)
        self._call = torch.ops.mkldnn._linear_pointwise.default
        self._call_binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: torch.Tensor, activation: tuple[str, str] = ("none", "")) -> torch.Tensor:
        """`activation(x @ weight.T + bias)`."""
        out: torch.Tensor = self._call(
            x, self._weight, self._bias, activation[0], [], activation[1]
        )
        return out

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + x @ weight.T + bias` in one call."""
        out: torch.Tensor = self._call_binary(x, residual, self._weight, self._bias, "add")
        return out


class CpuEmbed(ReferenceEmbed):
    """`Embed` that carries padding rows when the step has fewer tokens than projections like."""

    def run(self, batch: StepBatch) -> torch.Tensor:
        return PADDING(super().run(batch))


class CpuNormLinear:
    """`NormLinear`: norm, packed projection with the activation fused where oneDNN has it."""

    def __init__(
        self,
        norm: Norm,
        linear: Linear,
        activation: Activation | None,
        gated: bool,
        to: Target,
    ) -> None:
        self._norm, self._linear = norm_to(norm, to), PackedLinear(linear, to)
        fused = _FUSED_ACTIVATIONS.get(activation) if activation and not gated else None
        self._fused = fused or ("none", "")
        self._rest = None if fused else activation
        self._gated = gated

    @classmethod
    def prepare(
        cls, norm: Norm, linear: Linear, activation: Activation | None, gated: bool, to: Target
    ) -> Self | None:
        return cls(norm, linear, activation, gated, to) if _packs(to) else None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        y = self._linear(normalise(x, self._norm), self._fused)
        if self._gated and self._rest == "silu":
            half = y.shape[-1] // 2
            return F.silu(y[:, :half]).mul_(y[:, half:])
        return finish(y, self._rest, self._gated)


class CpuLinearResidual:
    """`LinearResidual` as one fused call."""

    def __init__(self, linear: Linear, to: Target) -> None:
        self._linear = PackedLinear(linear, to)

    @classmethod
    def prepare(cls, linear: Linear, to: Target) -> Self | None:
        return cls(linear, to) if _packs(to) else None

    def run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._linear.plus(x, residual)


class CpuLogits:
    """`Logits` with a packed head."""

    def __init__(self, norm: Norm, head: torch.Tensor, to: Target) -> None:
        self._norm, self._head = norm_to(norm, to), PackedLinear(Linear(head), to)

    @classmethod
    def prepare(cls, norm: Norm, head: torch.Tensor, to: Target) -> Self | None:
        return cls(norm, head, to) if _packs(to) else None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self._head(PADDING(normalise(x, self._norm)))[: x.shape[0]]


@dataclass(slots=True)
class DecodeGroup:
    """Rows `[first, last)` of the step, one token each, in consecutive slots from `slot` on."""

    first: int
    last: int
    slot: int
    context_tokens: int
    """The longest context among them; shorter ones are masked."""
    mask: torch.Tensor | None = None
    """`[rows, 1, 1, places]`, 0 or -inf; None if every place read counts."""

    @property
    def num_rows(self) -> int:
        """Rows of the group."""
        return self.last - self.first


def decode_groups(rows: Sequence[RowSpan], overhead_places: int) -> list[DecodeGroup]:
    """Cut decode rows, ordered by slot, into groups that are worth one batched product each.

    A group is a run of consecutive slots. It grows while the places wasted on padding cost less
    than another group: `overhead_places` is what one costs, in places read.
    """
    groups: list[DecodeGroup] = []
    useful = 0
    for number, row in enumerate(rows):
        length = row.context_tokens
        if groups and row.blocks[0] == groups[-1].slot + groups[-1].num_rows:
            group = groups[-1]
            longest = max(group.context_tokens, length)
            if longest * (group.num_rows + 1) <= useful + length + overhead_places:
                group.last, group.context_tokens = number + 1, longest
                useful += length
                continue
        groups.append(DecodeGroup(number, number + 1, row.blocks[0], length))
        useful = length
    return groups


def fresh_groups(rows: Sequence[RowSpan]) -> tuple[list[list[RowSpan]], list[RowSpan]]:
    """Put short prompts that begin in this step together, as long as padding wastes little.

    Returns:
        Groups of two or more rows without earlier context, and the rows left to go alone.
    """
    groups: list[list[RowSpan]] = []
    alone: list[RowSpan] = []
    short = [row for row in rows if row.num_tokens == row.context_tokens <= FRESH_TOKENS]
    alone += [row for row in rows if not row.num_tokens == row.context_tokens <= FRESH_TOKENS]
    for row in sorted(short, key=lambda row: -row.num_tokens):
        if groups and row.num_tokens * 4 >= groups[-1][0].num_tokens * 3:
            groups[-1].append(row)
        else:
            groups.append([row])
    alone += [group[0] for group in groups if len(group) == 1]
    return [group for group in groups if len(group) > 1], alone


@dataclass(slots=True)
class SlotPlan:
    """One step's attention over slots, shared by all layers of a spec."""

    batch: StepBatch
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    groups: list[DecodeGroup]
    prefills: list[RowSpan]
    """All rows of more than one token."""
    fresh: list[list[RowSpan]]
    alone: list[RowSpan]
    """The same rows, by how they attend."""


class CpuRopeWriteAttend:
    """`RopeWriteAttend` over contiguous slots.

    Decode batches rows of neighbouring slots into two products over whole slots: torch's batched
    product copies an operand whose batch stride is not dense, so reading masked places is cheaper than
    cutting them off, as long as most count. Prefill goes by blocks of queries, one product per key
    head, for the same reason.
    """

    def __init__(self, spec: AttentionSpec, to: Target) -> None:
        self._spec, self._dtype = spec, to.dtype
        self._rope = (
            rope_table(spec.rope, spec.head_dim, to.max_model_len, to) if spec.rope else None
        )
        self._per_kv_head = spec.num_heads // spec.num_kv_heads
        self._padded_heads = -(-self._per_kv_head // 4) * 4 if self._per_kv_head > 1 else 1
        self._overhead_places = GROUP_OVERHEAD_BYTES // (2 * spec.kv_size * to.dtype.itemsize)
        future = torch.full((FRESH_TOKENS, FRESH_TOKENS), float("-inf"), dtype=to.dtype).triu(1)
        self._future = future[:, None, :]

    @classmethod
    def prepare(cls, spec: AttentionSpec, to: Target) -> Self | None:
        return cls(spec, to) if to.block_tokens >= to.max_model_len and _packs(to) else None

    def plan(self, batch: StepBatch) -> SlotPlan:
        cos = sin = None
        if self._rope is not None:
            cos, sin = self._rope[:, batch.positions].unsqueeze(2).unbind(0)
        decode = batch.rows[: batch.num_decode_rows]
        groups = decode_groups(decode, self._overhead_places)
        for group in groups:
            places = self._places_read(group, batch.block_places)
            group.mask = self._mask(decode[group.first : group.last], places)
        prefills = batch.rows[batch.num_decode_rows :]
        return SlotPlan(batch, cos, sin, groups, prefills, *fresh_groups(prefills))

    def _places_read(self, group: DecodeGroup, block_places: int) -> int:
        """Whole slots if that wastes less than cutting them off would copy."""
        if self._is_small(group) or 2 * group.context_tokens < block_places:
            return group.context_tokens
        return block_places

    def _is_small(self, group: DecodeGroup) -> bool:
        heads = group.num_rows * self._spec.num_kv_heads
        return heads <= SDPA_HEADS and heads * group.context_tokens <= SDPA_HEADS * SDPA_PLACES

    def _mask(self, rows: Sequence[RowSpan], places: int) -> torch.Tensor | None:
        lengths = [row.context_tokens for row in rows]
        if min(lengths) == places:
            return None
        beyond = torch.arange(places) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(beyond.shape, dtype=self._dtype).masked_fill_(beyond, float("-inf"))
        return mask[:, None, None, :]

    def run(
        self, qkv: torch.Tensor, cache: torch.Tensor, plan: Any, *, sampled_only: bool = False
    ) -> torch.Tensor:
        step: SlotPlan = plan
        spec, num_tokens = self._spec, step.batch.num_tokens
        tokens = qkv[:num_tokens]
        if step.cos is not None and step.sin is not None:
            _rotate_in_place(tokens, spec, step.cos, step.sin)
        self._write(tokens, cache, step)
        q = tokens[:, : spec.q_size]
        if len(step.groups) == 1 and not step.prefills and num_tokens == qkv.shape[0]:
            return self._decode(q, cache, step.groups[0])
        out = torch.empty((qkv.shape[0], spec.q_size), dtype=qkv.dtype)
        out[num_tokens:] = 0
        for group in step.groups:
            out[group.first : group.last] = self._decode(q[group.first : group.last], cache, group)
        if sampled_only:
            for row in step.prefills:
                if row.samples:
                    self._prefill(q, cache, row, out, row.num_tokens - 1)
            return out
        for rows in step.fresh:
            self._fresh(tokens, rows, out)
        for row in step.alone:
            self._prefill(q, cache, row, out, 0)
        return out

    def _write(self, tokens: torch.Tensor, cache: torch.Tensor, step: SlotPlan) -> None:
        """Put the step's keys and values in their places; whole chunks as slices."""
        spec, batch = self._spec, step.batch
        kv = tokens[:, spec.q_size :].view(-1, 2, spec.num_kv_heads, spec.head_dim)
        ones = batch.num_decode_rows
        if ones == 1:
            row = batch.rows[0]
            cache[:, row.blocks[0], :, row.context_tokens - 1] = kv[0]
        elif ones:
            cache[:, batch.write_blocks[:ones], :, batch.write_offsets[:ones]] = kv[:ones]
        for row in step.prefills:
            new = kv[row.first : row.first + row.num_tokens]
            start = row.context_tokens - row.num_tokens
            cache[:, row.blocks[0], :, start : row.context_tokens] = new.permute(1, 2, 0, 3)

    def _decode(self, q: torch.Tensor, cache: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        """`q` `[rows, q_size]` of one group, to `[rows, q_size]`."""
        spec, rows, per_head = self._spec, group.num_rows, self._per_kv_head
        places = group.context_tokens if group.mask is None else group.mask.shape[-1]
        slots = cache[:, group.slot : group.slot + rows, :, :places]
        if self._is_small(group):
            queries = q.view(rows, spec.num_kv_heads, per_head, spec.head_dim)
            mixed = F.scaled_dot_product_attention(
                queries, slots[0], slots[1], attn_mask=group.mask, scale=spec.scale
            )
            return mixed.reshape(rows, spec.q_size)
        keys, values = slots.flatten(1, 2)
        heads, padded = rows * spec.num_kv_heads, self._padded_heads
        queries = q.new_zeros(
            heads, padded, spec.head_dim
        )  # products of 4 rows take less than of 3
        torch.mul(q.reshape(heads, per_head, -1), spec.scale, out=queries[:, :per_head])
        scores = torch.bmm(queries, keys.mT)
        if group.mask is not None:
            scores.view(rows, spec.num_kv_heads, padded, places).add_(group.mask)
        mixed = torch.bmm(scores.softmax(-1), values)
        return mixed[:, :per_head].reshape(rows, spec.q_size)

    def _fresh(self, tokens: torch.Tensor, rows: Sequence[RowSpan], out: torch.Tensor) -> None:
        """Attention of prompts without earlier context, padded to the longest, in two products.

        Padding is at the end, where no token of the prompt looks.
        """
        spec, per_head, count = self._spec, self._per_kv_head, rows[0].num_tokens
        padded = tokens.new_zeros(len(rows), count, spec.qkv_size)
        for place, row in zip(padded, rows, strict=True):
            place[: row.num_tokens] = tokens[row.first : row.first + row.num_tokens]
        q, k, v = (
            part.unflatten(2, (spec.num_kv_heads, -1, spec.head_dim)).transpose(1, 2).flatten(2, 3)
            for part in padded.split([spec.q_size, spec.kv_size, spec.kv_size], dim=2)
        )
        scores = torch.bmm(q.flatten(0, 1).mul_(spec.scale), k.flatten(0, 1).mT)
        scores.view(-1, count, per_head, count).add_(self._future[:count, :, :count])
        mixed = torch.bmm(scores.softmax(-1), v.flatten(0, 1))
        heads = mixed.view(len(rows), spec.num_kv_heads, count, per_head * spec.head_dim)
        for row, place in zip(rows, heads.transpose(1, 2), strict=True):
            target = out[row.first : row.first + row.num_tokens]
            target.view(row.num_tokens, spec.num_kv_heads, -1).copy_(place[: row.num_tokens])

    def _prefill(
        self, q: torch.Tensor, cache: torch.Tensor, row: RowSpan, out: torch.Tensor, skip: int
    ) -> None:
        """Attention of one chunk but its first `skip` tokens, block of queries by block, written to
        the row's part of `out`.
        """
        spec, per_head, count = self._spec, self._per_kv_head, row.num_tokens - skip
        heads_shape = (count, spec.num_kv_heads, per_head, spec.head_dim)
        span = slice(row.first + skip, row.first + row.num_tokens)
        queries = q[span].view(heads_shape).transpose(0, 1).contiguous().mul_(spec.scale)
        queries = queries.flatten(1, 2)
        target = out[span].view(heads_shape).transpose(0, 1)
        keys, values = cache[:, row.blocks[0]].unbind(0)
        before = row.context_tokens - count
        for first in range(0, count, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, count)
            size, seen = last - first, before + last
            scores = queries.new_empty(spec.num_kv_heads, size * per_head, seen)
            for head in range(spec.num_kv_heads):
                block = queries[head, first * per_head : last * per_head]
                torch.mm(block, keys[head, :seen].T, out=scores[head])
            newest = scores.view(spec.num_kv_heads, size, per_head, seen)[..., seen - size :]
            newest += self._future[:size, :, :size]
            weights = scores.softmax(-1)
            for head in range(spec.num_kv_heads):
                mixed = torch.mm(weights[head], values[head, :seen])
                target[head, first:last] = mixed.view(size, per_head, spec.head_dim)


def _rotate_in_place(
    tokens: torch.Tensor, spec: AttentionSpec, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Rotate the queries and keys inside `tokens` `[tokens, qkv_size]`."""
    dim = spec.head_dim
    heads = tokens[:, : spec.q_size + spec.kv_size].view(tokens.shape[0], -1, dim)
    swapped = heads.roll(dim // 2, dims=-1)
    heads.mul_(cos).addcmul_(swapped, sin)


BODIES = Bodies(
    "cpu",
    embed=CpuEmbed,
    norm_linear=CpuNormLinear,
    attend=CpuRopeWriteAttend,
    linear_residual=CpuLinearResidual,
    logits=CpuLogits,
)
