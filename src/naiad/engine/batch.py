"""One step as arrays: what the decoder and every op see instead of requests.

A step computes a flat run of tokens, row after row. `RowSpan` says which of them belong to one
sequence; per-token arrays say where each token's keys and values are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class RowSpan:
    """Tokens `[first, first + num_tokens)` of the step are the newest of one sequence."""

    first: int
    num_tokens: int
    context_tokens: int
    """Tokens of the sequence after this step: the newest are at the end of its context."""
    blocks: Sequence[int]
    """Block table of the sequence; may be longer than the context needs."""
    samples: bool
    """Whether the successor of its last token is wanted."""


@dataclass(slots=True)
class StepBatch:
    """All rows of one step; tensors are on the model's device, int64."""

    rows: list[RowSpan]
    num_decode_rows: int
    """The first rows, which have one token each."""
    tokens: torch.Tensor
    """`[tokens]` ids."""
    positions: torch.Tensor
    """`[tokens]` position in the sequence."""
    write_blocks: torch.Tensor
    """`[tokens]` KV block that receives the token's keys and values."""
    write_offsets: torch.Tensor
    """`[tokens]` place inside that block."""
    sampled: torch.Tensor
    """`[sampled]` indices of the tokens whose successor is wanted."""
    block_places: int
    """Places that a KV block has at present; slots grow (`kv.storage`), pages do not."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return self.tokens.shape[0]


@dataclass(slots=True)
class RowInput:
    """One row before it is laid out: new token ids from position `start` on."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    samples: bool


def build_batch(inputs: Sequence[RowInput], block_tokens: int, device: torch.device) -> StepBatch:
    """Lay rows out flat, in the given order; rows of one token must come first.

    Args:
        inputs: At least one row; each row's block table covers its new tokens.
        block_tokens: Places per KV block.
        device: Where the arrays go.
    """
    lengths = [len(row.token_ids) for row in inputs]
    total = sum(lengths)
    arrays = np.empty((4, total), dtype=np.int64)
    rows: list[RowSpan] = []
    sampled: list[int] = []
    num_decode_rows = 0
    first = 0
    for row, length in zip(inputs, lengths, strict=True):
        end = first + length
        rows.append(RowSpan(first, length, row.start + length, row.blocks, row.samples))
        arrays[0, first:end] = row.token_ids
        if length == 1:
            num_decode_rows += 1
            arrays[1, first] = row.start
            arrays[2, first] = row.blocks[row.start // block_tokens]
        else:
            positions = np.arange(row.start, row.start + length)
            arrays[1, first:end] = positions
            arrays[2, first:end] = np.asarray(row.blocks)[positions // block_tokens]
        if row.samples:
            sampled.append(end - 1)
        first = end
    np.remainder(arrays[1], block_tokens, out=arrays[3])
    tokens, positions_, blocks, offsets = torch.from_numpy(arrays).to(device).unbind(0)
    return StepBatch(
        rows=rows,
        num_decode_rows=num_decode_rows,
        tokens=tokens,
        positions=positions_,
        write_blocks=blocks,
        write_offsets=offsets,
        sampled=torch.tensor(sampled, dtype=torch.int64, device=device),
        block_places=block_tokens,
    )
