"""KV cache of contiguous slots with a prefix cache: which slot holds what, no tensors.

Every live sequence has one slot, a run of `max_model_len` places. Memory behind untouched places
costs nothing, so what limits the cache is `capacity_tokens`, the sum of what live sequences have
reserved. A freed slot keeps its tokens for matching until it is given away again.

A prefix is reused in place if its slot is free, and copied out of it otherwise. New sequences go to
low slots, so that a step over the live ones is a step over a dense range, but not always to the
lowest: `num_spare_slots` beyond the number of live sequences are used in turn, or a machine that
serves one conversation at a time would remember only the last one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from naiad.engine.kv import hashing
from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.prefix import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Slot:
    """One slot: the tokens it holds, and the digests of their full chunks."""

    __slots__ = ("digests", "num_reserved", "num_tokens", "number", "table", "tokens")

    def __init__(self, number: int) -> None:
        self.number = number
        self.table = [number]
        self.tokens: list[int] = []  # empty without prefix cache
        self.digests: list[bytes] = []
        self.num_tokens = 0
        self.num_reserved = 0


class SlotManager:
    """A `KvManager` over `num_slots` contiguous slots.

    Args:
        num_slots: Most sequences that live at once.
        max_model_len: Places of one slot.
        capacity_tokens: Limit on the sum of reserved tokens of live sequences.
        page_tokens: Chunk of the prefix lookup.
        prefix_cache: Whether tokens of ended or other live sequences are reused.
        min_copy_tokens: Shorter prefixes are computed again rather than copied.
        num_spare_slots: How far beyond a dense range retained prefixes may spread.
    """

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        capacity_tokens: int,
        page_tokens: int = 64,
        *,
        prefix_cache: bool = True,
        min_copy_tokens: int = 16,
        num_spare_slots: int = 4,
    ) -> None:
        self._slots = [_Slot(number) for number in range(num_slots)]
        self._max_model_len = max_model_len
        self._capacity = capacity_tokens
        self._page_tokens = page_tokens
        self._index = PrefixIndex(page_tokens) if prefix_cache else None
        self._min_copy = min_copy_tokens
        self._num_spare = max(1, num_spare_slots)
        self._live: dict[int, _Slot] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))  # oldest first
        self._used = 0
        self._copies: list[KvCopy] = []
        self._released: list[int] = []  # only without prefix cache, which reads freed slots

    @property
    def capacity_tokens(self) -> int:
        """Tokens that live sequences can reserve together."""
        return self._capacity

    @property
    def used_tokens(self) -> int:
        """Tokens that live sequences have reserved."""
        return self._used

    def max_tokens_per_sequence(self) -> int:
        """One slot, or the whole capacity if that is less."""
        return min(self._max_model_len, self._capacity)

    def match(self, sequence: int, token_ids: Sequence[int], spare_tokens: int = 0) -> int | None:
        """Take the free slot with the longest prefix, or copy one into a free slot."""
        assert sequence not in self._live, f"sequence {sequence} already lives"
        if not self._free or self._used + len(token_ids) + spare_tokens > self._capacity:
            return None
        slot, num_tokens = self._choose(token_ids)
        self._start(sequence, slot, num_tokens)
        return num_tokens

    def fork(self, parent: int, child: int, num_tokens: int) -> bool:
        """Copy the first `num_tokens` places of the parent's slot into a free one."""
        source = self._live[parent]
        assert num_tokens <= source.num_tokens, "fork beyond what was appended"
        assert child not in self._live, f"sequence {child} already lives"
        if not self._free or self._used + num_tokens > self._capacity:
            return False
        slot = self._pick()
        self._copy(source, slot, num_tokens)
        self._start(child, slot, num_tokens)
        return True

    def reserve(self, sequence: int, num_tokens: int) -> bool:
        """Count the tokens against the capacity; the places are there already."""
        slot = self._live[sequence]
        assert num_tokens <= self._max_model_len, "reserve beyond the slot"
        need = num_tokens - slot.num_reserved
        if need <= 0:
            return True
        if self._used + need > self._capacity:
            return False
        self._used += need
        slot.num_reserved = num_tokens
        return True

    def append(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Record written tokens; from now on others may copy them."""
        slot = self._live[sequence]
        before = slot.num_tokens
        slot.num_tokens = after = before + len(token_ids)
        assert after <= slot.num_reserved, "append without reserve"
        if self._index is None:
            return
        slot.tokens.extend(token_ids)
        size = self._page_tokens
        if before % size == 0 or before // size != after // size:
            self._register(slot, before)

    def free(self, sequence: int) -> None:
        """Give the slot back; its tokens stay matchable until the slot is given away."""
        slot = self._live.pop(sequence)
        self._used -= slot.num_reserved
        slot.num_reserved = 0
        slot.num_tokens = len(slot.tokens)
        self._free[slot.number] = None
        if self._index is None:
            self._released.append(slot.number)

    def block_table(self, sequence: int) -> list[int]:
        """The one slot of `sequence`; read it, never change it."""
        return self._live[sequence].table

    def take_released(self) -> list[int]:
        """Slots freed since the last call whose tokens nobody can match."""
        released, self._released = self._released, []
        return released

    def take_copies(self) -> list[KvCopy]:
        """The copy orders issued since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def reset_prefix_cache(self) -> None:
        """Empty every free slot."""
        for number in self._free:
            self._truncate(self._slots[number], 0)

    def check(self) -> None:
        """Recount reserved tokens and index entries, and find every slot in exactly one place."""
        live = sorted(slot.number for slot in self._live.values())
        places = sorted([*live, *self._free])
        assert places == list(range(len(self._slots))), "a slot is lost, or in two places"
        reserved = sum(slot.num_reserved for slot in self._live.values())
        assert reserved == self._used, "reserved tokens are miscounted"
        assert self._used <= self._capacity, "more reserved than there is"
        for slot in self._live.values():
            assert slot.num_tokens <= slot.num_reserved, "written without reserve"
            assert self._index is None or slot.num_tokens == len(slot.tokens)
        if self._index:
            size = self._page_tokens
            begun = sum(-(-len(slot.tokens) // size) for slot in self._slots)
            full = sum(len(slot.tokens) // size for slot in self._slots)
            assert full == sum(len(slot.digests) for slot in self._slots)
            assert self._index.num_entries() == begun + full, "the prefix index is out of step"

    def _choose(self, token_ids: Sequence[int]) -> tuple[_Slot, int]:
        """The slot for a new sequence and how many of its tokens are there (a copy is ordered)."""
        in_place, anywhere = self._best_holders(token_ids)
        target = self._pick()
        if anywhere is None:
            return target, 0
        source, best = anywhere
        if in_place is not None and in_place[1] > best - self._min_copy:
            slot, num_tokens = in_place
            num_lost = len(slot.tokens) - num_tokens
            # A short common beginning is not worth a long retained conversation.
            if slot is target or num_lost <= num_tokens:
                return slot, num_tokens
            source, best = slot, num_tokens
        if best < self._min_copy or source is target:
            return target, 0
        self._copy(source, target, best)
        return target, best

    def _best_holders(
        self, token_ids: Sequence[int]
    ) -> tuple[tuple[_Slot, int] | None, tuple[_Slot, int] | None]:
        """The free slot and the slot of any kind that hold most of `token_ids[:-1]`."""
        if self._index is None or len(token_ids) < 2:
            return None, None
        size, limit = self._page_tokens, len(token_ids) - 1
        digests = self._index.walk(token_ids, limit)
        start = len(digests) * size
        found: list[tuple[int, bool, int]] = []
        if start < limit:
            wanted = list(token_ids[start : min(limit, start + size)])
            parent = digests[-1] if digests else hashing.ROOT
            for number in self._index.begun(parent, wanted[0]):
                held = self._slots[number].tokens[start : start + size]
                num_tokens = start + hashing.common_prefix(wanted, held)
                found.append((num_tokens, number in self._free, number))
        if digests:
            found += [
                (start, number in self._free, number) for number in self._index.holders(digests[-1])
            ]
        if not found:
            return None, None
        num_tokens, _, number = max(found)
        anywhere = self._slots[number], num_tokens
        num_tokens, is_free, number = max(found, key=lambda entry: (entry[1], entry[0]))
        return (self._slots[number], num_tokens) if is_free else None, anywhere

    def _pick(self) -> _Slot:
        """A free low slot: the lowest empty one, else the one whose tokens are oldest."""
        window = len(self._live) + self._num_spare
        near = [number for number in self._free if number < window]
        empty = [number for number in near if not self._slots[number].tokens]
        return self._slots[min(empty) if empty else near[0]]

    def _start(self, sequence: int, slot: _Slot, num_tokens: int) -> None:
        """Make `slot`, cut to its first `num_tokens` tokens, the live slot of `sequence`."""
        del self._free[slot.number]
        self._truncate(slot, num_tokens)
        slot.num_tokens = slot.num_reserved = num_tokens
        self._used += num_tokens
        self._live[sequence] = slot

    def _copy(self, source: _Slot, target: _Slot, num_tokens: int) -> None:
        self._truncate(target, 0)
        self._copies.append(KvCopy(source.number, target.number, num_tokens))
        if self._index is not None:
            target.tokens = source.tokens[:num_tokens]
            self._register(target, 0, source.digests)
        if source.number in self._free:
            self._free.move_to_end(source.number)

    def _register(self, slot: _Slot, before: int, known: Sequence[bytes] = ()) -> None:
        """Enter the chunks that began or filled up with `slot.tokens[before:]` into the index.

        `known` are digests of the first chunks, where they need not be computed.
        """
        assert self._index is not None
        size, tokens = self._page_tokens, slot.tokens
        start = before - before % size
        while start < len(tokens):
            parent = slot.digests[-1] if slot.digests else hashing.ROOT
            if start >= before:
                self._index.begin(parent, tokens[start], slot.number)
            start += size
            if start <= len(tokens):
                number = len(slot.digests)
                chunk = tokens[start - size : start]
                digest = known[number] if number < len(known) else hashing.chain(parent, chunk)
                slot.digests.append(digest)
                self._index.fill(digest, slot.number)

    def _truncate(self, slot: _Slot, num_tokens: int) -> None:
        """Forget what `slot` holds from `num_tokens` on."""
        if self._index is None:
            return
        size, tokens, digests = self._page_tokens, slot.tokens, slot.digests
        for chunk in reversed(range(-(-len(tokens) // size))):
            if num_tokens < (chunk + 1) * size <= len(tokens):
                self._index.drop_filled(digests.pop(), slot.number)
            if chunk * size < num_tokens:
                break
            parent = digests[chunk - 1] if chunk else hashing.ROOT
            self._index.drop_begun(parent, tokens[chunk * size], slot.number)
        del tokens[num_tokens:]
