"""Which slot a sequence gets, and when a prefix is copied: one example for each rule."""

from __future__ import annotations

import pytest

from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.slots import SlotManager

LONG = list(range(100, 140))


def make(num_slots: int = 8, capacity_tokens: int = 512, num_spare_slots: int = 4) -> SlotManager:
    return SlotManager(num_slots, 64, capacity_tokens, 8, num_spare_slots=num_spare_slots)


def store(kv: SlotManager, sequence: int, token_ids: list[int]) -> int:
    """Start, reserve and append; return the slot."""
    num_cached = kv.match(sequence, token_ids)
    assert num_cached is not None
    assert kv.reserve(sequence, len(token_ids))
    kv.append(sequence, token_ids[num_cached:])
    kv.check()
    (slot,) = kv.block_table(sequence)
    return slot


def test_new_sequences_take_the_lowest_slots() -> None:
    kv = make()

    assert [store(kv, sequence, [sequence, 1]) for sequence in range(3)] == [0, 1, 2]


def test_a_conversation_goes_on_in_its_own_slot() -> None:
    kv = make()
    store(kv, 0, [1, 2])
    slot = store(kv, 1, LONG)
    kv.free(1)

    assert store(kv, 2, [*LONG, 7, 8]) == slot
    assert kv.take_copies() == []


def test_a_prefix_of_a_live_sequence_is_copied() -> None:
    kv = make()
    store(kv, 0, LONG)

    assert kv.match(1, [*LONG[:30], 7]) == 30
    assert kv.take_copies() == [KvCopy(0, 1, 30)]


def test_a_tiny_prefix_is_computed_again_rather_than_copied() -> None:
    kv = make()
    store(kv, 0, LONG)

    assert kv.match(1, [*LONG[:15], 7]) == 0
    assert kv.match(2, [*LONG[:16], 7]) == 16


def test_a_free_slot_with_nearly_as_much_is_taken_without_a_copy() -> None:
    kv = make()
    store(kv, 0, LONG[:39])
    slot = store(kv, 1, LONG[:35])
    kv.take_copies()
    kv.free(1)

    assert kv.match(2, [*LONG[:39], 7]) == 35
    assert kv.block_table(2) == [slot]
    assert kv.take_copies() == []


def test_a_short_common_beginning_does_not_cost_a_long_conversation() -> None:
    kv = make()
    store(kv, 0, LONG)
    kv.free(0)

    assert kv.match(1, [*LONG[:16], 7]) == 16
    assert kv.take_copies() == [KvCopy(0, 1, 16)]
    assert kv.match(2, [*LONG, 7]) == 40


def test_conversations_in_turn_remember_each_other() -> None:
    kv = make()
    for sequence in range(4):
        store(kv, sequence, [sequence, *LONG])
        kv.free(sequence)

    for sequence in range(4):
        assert kv.match(10 + sequence, [sequence, *LONG, 7]) == 41
        kv.free(10 + sequence)


def test_retained_prefixes_stay_near_the_live_ones() -> None:
    kv = make(num_spare_slots=2)

    slots = []
    for sequence in range(6):
        slots.append(store(kv, sequence, [sequence] * 20))
        kv.free(sequence)

    assert slots == [0, 1, 0, 1, 0, 1]


def test_live_tokens_are_limited_whatever_the_slots() -> None:
    kv = make(capacity_tokens=50)
    store(kv, 0, LONG)

    assert kv.match(1, [1] * 11) is None
    assert kv.match(1, [1] * 10) == 0
    assert kv.reserve(1, 10)
    assert not kv.reserve(0, 41)
    kv.free(1)
    assert kv.reserve(0, 50)


def test_no_slot_means_no_start() -> None:
    kv = make(num_slots=1)
    store(kv, 0, [1, 2])

    assert kv.match(1, [3]) is None
    assert not kv.fork(0, 1, 1)


@pytest.mark.parametrize(("prefix_cache", "released"), [(True, []), (False, [0])])
def test_a_freed_slot_is_released_only_if_nobody_can_match_it(
    prefix_cache: bool, released: list[int]
) -> None:
    manager = SlotManager(2, 64, 128, 16, prefix_cache=prefix_cache)
    manager.match(1, [1, 2, 3])
    manager.free(1)

    assert manager.take_released() == released
    assert manager.take_released() == []
