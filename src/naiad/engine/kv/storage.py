"""The tensors of the KV cache, for both layouts.

A block is a page of a few tokens or a slot of a whole sequence: the layouts differ only in block size
and in who assigns blocks (`kv.pages`, `kv.slots`). Token at position p of a sequence with block table t
lives in block `t[p // block_tokens]` at offset `p % block_tokens`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch

from naiad.engine.batch import StepBatch
from naiad.engine.kv.base import KvCopy
from naiad.engine.spec import ModelSpec

# Not in the mmap module. The reservation may exceed memory, its use may not.
_MAP_NORESERVE = 0x4000


class KvStorage:
    """Blocks of fixed size; `layers[i]` is `[2, blocks, kv_heads, block_tokens, head_dim]`, keys first.

    Args:
        spec: The model's shape.
        num_blocks: Pages, or slots.
        block_tokens: Places of one block.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec, self._num_blocks = spec, num_blocks
        self._dtype, self._device = dtype, device
        self.layers: list[torch.Tensor] = []
        self._tensor = self._allocate(block_tokens)

    @property
    def block_places(self) -> int:
        """Places that a block has now."""
        return self._tensor.shape[4]

    def begin(
        self, batch: StepBatch, copies: Iterable[KvCopy], released: Iterable[int] = ()
    ) -> None:
        """Carry out copy orders, in sequence, before the step `batch`; mutates the target blocks.

        Args:
            batch: The step; learns how many places a block has.
            copies: Orders of the cache's manager.
            released: Blocks whose contents need not be kept any more.
        """
        for order in copies:
            places = slice(0, order.num_tokens)
            target = self._tensor[:, :, order.target, :, places]
            target.copy_(self._tensor[:, :, order.source, :, places])
        batch.block_places = self.block_places

    def _allocate(self, places: int) -> torch.Tensor:
        """Zeros, not garbage: attention may read (and mask) places that were never written, and NaN
        times zero is NaN.
        """
        attention = self._spec.attention
        heads, dim = attention.num_kv_heads, attention.head_dim
        shape = (self._spec.num_layers, 2, self._num_blocks, heads, places, dim)
        if self._device.type == "cpu":
            tensor = _lazy_zeros(shape, self._dtype)
        else:
            tensor = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self.layers = list(tensor.unbind(0))
        return tensor


class SlotStorage(KvStorage):
    """Slots that are as long as the longest sequence of now, rounded up, not as the longest allowed.

    Attention over neighbouring slots is one dense product only if slots end where the contexts do
    (`ops.cpu`). Growing copies what the slots hold; it happens every `GROWTH_TOKENS` tokens of the
    longest sequence, or every eighth of its length if that is more.
    """

    GROWTH_TOKENS = 64

    def __init__(
        self, spec: ModelSpec, num_blocks: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, self.GROWTH_TOKENS, dtype=dtype, device=device)
        self._held = [0] * num_blocks
        """Tokens that each slot holds, live or kept for the prefix cache."""

    def begin(
        self, batch: StepBatch, copies: Iterable[KvCopy], released: Iterable[int] = ()
    ) -> None:
        for slot in released:
            self._held[slot] = 0
        orders = list(copies)
        longest = max(row.context_tokens for row in batch.rows)
        if longest > self.block_places:
            self._resize(longest)
        super().begin(batch, orders, released)
        for order in orders:
            self._held[order.target] = order.num_tokens
        for row in batch.rows:
            self._held[row.blocks[0]] = row.context_tokens
        if max(self._held) * 4 < self.block_places:
            self._resize(max(self._held))
            batch.block_places = self.block_places

    def _resize(self, tokens: int) -> None:
        """Move what the slots hold into slots of at least `tokens` places."""
        step = max(self.GROWTH_TOKENS, tokens // 8 // self.GROWTH_TOKENS * self.GROWTH_TOKENS)
        old = self._tensor
        self._tensor = self._allocate(-(-tokens // step) * step)
        for slot, held in enumerate(self._held):
            if held:
                places = slice(0, min(held, tokens))
                self._tensor[:, :, slot, :, places] = old[:, :, slot, :, places]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory the operating system commits page by page; torch.zeros touches it all."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    buffer = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
