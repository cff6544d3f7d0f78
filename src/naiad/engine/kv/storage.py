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

from naiad.engine.kv.base import KvCopy
from naiad.engine.spec import ModelSpec

_MAP_NORESERVE = 0x4000  # not in the mmap module; the reservation may exceed memory, its use may not


class KvStorage:
    """`tensor` is `[layers, 2, blocks, kv_heads, block_tokens, head_dim]`, keys first.

    On CPU the memory is reserved, not touched: pages of the operating system are committed when a
    token is first written there, so a long slot that stays short costs little.
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
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        shape = (
            spec.num_layers,
            2,
            num_blocks,
            spec.attention.num_kv_heads,
            block_tokens,
            spec.attention.head_dim,
        )
        # Zeros, not garbage: padded attention reads (and masks) places that were never written, and
        # NaN times zero is NaN.
        if device.type == "cpu":
            self.tensor = _lazy_zeros(shape, dtype)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = list(self.tensor.unbind(0))

    def copy(self, orders: Iterable[KvCopy]) -> None:
        """Carry out copy orders, in sequence; mutates the target blocks."""
        for order in orders:
            places = slice(0, order.num_tokens)
            self.tensor[:, :, order.target, :, places] = self.tensor[:, :, order.source, :, places]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory the operating system commits page by page; torch.zeros touches it all."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    buffer = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
