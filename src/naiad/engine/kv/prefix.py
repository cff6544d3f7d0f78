"""Which blocks hold which chunks of tokens: the lookup behind both layouts' prefix cache.

Token lists are cut into chunks of `chunk_tokens`. A full chunk is found by its chained digest; the
chunk that follows a matched one, full or not, is found by its parent's digest and its first token,
and then compared token by token. That gives the hit rate of a radix tree with dictionary lookups.

The index stores no tokens and owns no block: a layout tells it what begins, fills up and goes.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from naiad.engine.kv import hashing

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CANDIDATES = 16
"""Blocks compared token by token in one lookup, newest first; bounds it under a popular prefix."""


class PrefixIndex:
    """See the module docstring. Every call is O(1) but `walk`, which is linear in what it matches."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        # Inner dicts are ordered sets, oldest first.
        self._full: dict[bytes, dict[int, None]] = {}
        self._heads: dict[tuple[bytes, int], dict[int, None]] = {}

    def begin(self, parent: bytes, first_token: int, block: int) -> None:
        """`block` now holds the first token of a chunk behind `parent`."""
        self._heads.setdefault((parent, first_token), {})[block] = None

    def fill(self, digest: bytes, block: int) -> None:
        """`block` now holds the whole chunk named by `digest`."""
        self._full.setdefault(digest, {})[block] = None

    def drop_begun(self, parent: bytes, first_token: int, block: int) -> None:
        """Undo `begin`."""
        blocks = self._heads[parent, first_token]
        del blocks[block]
        if not blocks:
            del self._heads[parent, first_token]

    def drop_filled(self, digest: bytes, block: int) -> None:
        """Undo `fill`."""
        blocks = self._full[digest]
        del blocks[block]
        if not blocks:
            del self._full[digest]

    def walk(self, token_ids: Sequence[int], limit: int) -> list[bytes]:
        """Digests of the longest run of full chunks of `token_ids[:limit]` that some block holds."""
        digests: list[bytes] = []
        parent = hashing.ROOT
        size = self.chunk_tokens
        for start in range(0, limit - size + 1, size):
            parent = hashing.chain(parent, token_ids[start : start + size])
            if parent not in self._full:
                break
            digests.append(parent)
        return digests

    def holder(self, digest: bytes) -> int:
        """The oldest block that holds the chunk named by `digest`."""
        return next(iter(self._full[digest]))

    def num_holders(self, digest: bytes) -> int:
        """How many blocks hold the chunk named by `digest`."""
        return len(self._full.get(digest, ()))

    def holders(self, digest: bytes) -> list[int]:
        """The newest blocks that hold the chunk named by `digest`, newest first."""
        return list(islice(reversed(self._full.get(digest, {})), MAX_CANDIDATES))

    def begun(self, parent: bytes, first_token: int) -> list[int]:
        """The newest blocks with a chunk behind `parent` that begins so, newest first."""
        return list(islice(reversed(self._heads.get((parent, first_token), {})), MAX_CANDIDATES))

    def num_entries(self) -> int:
        """Pairs of chunk and block in the index, for invariants."""
        return sum(map(len, self._full.values())) + sum(map(len, self._heads.values()))
