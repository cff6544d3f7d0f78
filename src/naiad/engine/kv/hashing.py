"""Chained hashes of token chunks: equal digests mean equal tokens from position 0 on.

A digest covers its own chunk and, through its parent's digest, everything before it. Cryptographic
(blake2b), because whoever could make two prompts collide could read another tenant's cache. The same
tokens give the same digest in every process on every little-endian machine.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = b""
"""Parent of the first chunk."""

DIGEST_BYTES = 16


def chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of the chunk `token_ids` behind everything that `parent` covers."""
    data = parent + array("i", token_ids).tobytes()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens `left` and `right` (both lists) share from the start.

    By halving and comparing slices, which run at C speed: chunks are short and mostly equal.
    """
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
