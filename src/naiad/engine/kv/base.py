"""The bookkeeping interface of the KV cache, shared by both layouts. No torch, no tensors.

A manager knows which places of the cache hold the keys and values of which tokens. It decides and
counts; the tensors are in `engine.kv.storage`, which carries out the `KvCopy` orders that a manager
issues. Two layouts implement it: `pages` (reference-counted pages, hash chains, copy on write at the
partial tail) and `slots` (one contiguous run per sequence, prefixes copied or reused in place).

Life of a sequence: `match` or `fork` starts it, `reserve` makes room before a step, `append` says what
the step wrote, `free` ends it. Preemption is `free`, then later `match` again. Positions count from 0;
token i's keys and values are at position i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class KvCopy(msgspec.Struct, frozen=True):
    """Copy the first `num_tokens` places of block `source` to block `target`, all layers.

    A block is a page or a slot. Orders are carried out strictly one after the other, before the step
    that follows: the target of one may be the source or the target of a later one.
    """

    source: int
    target: int
    num_tokens: int


class KvManager(Protocol):
    """See the module docstring. `sequence` is any int unique among live sequences."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens that live sequences can hold together, before sharing."""

    @property
    def used_tokens(self) -> int:
        """Tokens of capacity that live sequences hold now, shared pages counted once."""

    def max_tokens_per_sequence(self) -> int:
        """The longest single sequence that fits into an otherwise empty cache."""

    def match(self, sequence: int, token_ids: Sequence[int], spare_tokens: int = 0) -> int | None:
        """Start `sequence` with the longest cached prefix of `token_ids`.

        At most `len(token_ids) - 1` tokens match, so that at least one is left to compute. Shared
        pages gain a reference; a partial tail is copied (an order is issued). What matched counts as
        appended and reserved. With an empty `token_ids` the sequence starts with nothing.

        Args:
            sequence: Its key.
            token_ids: All tokens known so far; the caller reserves places for them next.
            spare_tokens: Room that must be left for others beside them.

        Returns:
            The number of tokens whose keys and values are already there, 0 without a hit or without
            prefix cache; None if there is no room for `token_ids` and the spare now (nothing
            changed).
        """

    def fork(self, parent: int, child: int, num_tokens: int) -> bool:
        """Start `child` with the first `num_tokens` of `parent`, which must have appended them.

        Returns:
            False if no block is left (nothing changed).
        """

    def reserve(self, sequence: int, num_tokens: int) -> bool:
        """Make positions `[0, num_tokens)` of `sequence` writable and exclusively its own where new.

        Cached but unreferenced blocks are evicted as needed, least recently used first.

        Returns:
            False if it does not fit (nothing changed): the caller preempts somebody or waits.
        """

    def append(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Record that the keys and values of these next tokens have been written.

        Call it only once the step is done: from now on others may match them.
        """

    def free(self, sequence: int) -> None:
        """End `sequence`: drop its references; what it appended stays matchable until evicted."""

    def block_table(self, sequence: int) -> list[int]:
        """The live list of blocks of `sequence`, in order; read it, never change it."""

    def take_copies(self) -> list[KvCopy]:
        """The copy orders issued since the last call, in order; the caller carries them out now."""

    def take_released(self) -> list[int]:
        """Blocks freed since the last call whose contents will never be read again.

        Storage that grows with its contents need not keep them; some may be in use again already.
        """

    def reset_prefix_cache(self) -> None:
        """Forget everything cached that no live sequence holds."""

    def check(self) -> None:
        """Raise `AssertionError` if an invariant is broken. Cost is linear in the cache's size."""
