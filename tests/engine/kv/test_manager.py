"""What both layouts promise, on both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from naiad.engine.kv.base import KvManager
from naiad.engine.kv.pages import PageManager
from naiad.engine.kv.slots import SlotManager

MakeKv = Callable[..., KvManager]

PROMPT = list(range(100, 110))


def pages(capacity_tokens: int = 64, *, prefix_cache: bool = True) -> KvManager:
    return PageManager(capacity_tokens // 4, 4, prefix_cache=prefix_cache)


def slots(capacity_tokens: int = 64, *, prefix_cache: bool = True) -> KvManager:
    return SlotManager(4, 32, capacity_tokens, 4, prefix_cache=prefix_cache, min_copy_tokens=1)


both = pytest.mark.parametrize("make", [pages, slots])


def start(kv: KvManager, sequence: int, token_ids: list[int]) -> int:
    """Start, reserve and append; return how many tokens were there already."""
    num_cached = kv.match(sequence, token_ids)
    assert num_cached is not None
    assert kv.reserve(sequence, len(token_ids))
    kv.append(sequence, token_ids[num_cached:])
    kv.check()
    return num_cached


@both
def test_an_empty_cache_matches_nothing(make: MakeKv) -> None:
    kv = make()

    assert start(kv, 0, PROMPT) == 0
    assert kv.take_copies() == []
    assert kv.used_tokens >= len(PROMPT)


@both
def test_an_ended_sequence_is_matched_to_the_token_but_for_the_last(make: MakeKv) -> None:
    kv = make()
    start(kv, 0, PROMPT)
    kv.free(0)
    assert kv.used_tokens == 0

    assert start(kv, 1, PROMPT) == 9
    assert start(kv, 2, [*PROMPT[:7], 1, 2, 3]) == 7


@both
def test_a_live_sequence_is_matched_by_copying_what_is_partial(make: MakeKv) -> None:
    kv = make()
    start(kv, 0, PROMPT)

    assert start(kv, 1, [*PROMPT, 1]) == 10
    (copy,) = kv.take_copies()
    assert copy.source == kv.block_table(0)[-1]
    assert copy.target == kv.block_table(1)[-1]


@both
def test_only_what_was_appended_is_matched(make: MakeKv) -> None:
    kv = make()
    assert kv.match(0, PROMPT) == 0
    assert kv.reserve(0, len(PROMPT))
    kv.append(0, PROMPT[:5])

    assert kv.match(1, PROMPT) == 5


@both
def test_without_prefix_cache_nothing_is_matched_but_forks_work(make: MakeKv) -> None:
    kv = make(prefix_cache=False)
    start(kv, 0, PROMPT)

    assert start(kv, 1, PROMPT) == 0
    assert kv.fork(0, 2, 9)
    assert len(kv.take_copies()) == 1
    kv.check()


@both
def test_a_fork_writes_where_nobody_else_does(make: MakeKv) -> None:
    kv = make()
    start(kv, 0, PROMPT)
    assert kv.fork(0, 1, 9)
    assert kv.reserve(1, 10)
    kv.append(1, [55])
    kv.check()

    assert kv.block_table(0)[-1] != kv.block_table(1)[-1]
    kv.free(0)
    kv.check()
    assert kv.match(2, [*PROMPT[:9], 55, 66]) == 10


@both
def test_what_does_not_fit_is_refused_and_changes_nothing(make: MakeKv) -> None:
    kv = make(16)
    start(kv, 0, PROMPT)
    used = kv.used_tokens

    assert kv.match(1, list(range(8))) is None
    assert kv.match(1, [1], spare_tokens=8) is None
    assert not kv.reserve(0, 17)
    kv.check()
    assert kv.used_tokens == used
    assert kv.reserve(0, 16)


@both
def test_a_forgotten_prefix_is_not_matched_but_a_live_one_is(make: MakeKv) -> None:
    kv = make()
    start(kv, 0, PROMPT)
    start(kv, 1, [1, 2, 3, 4])
    kv.free(0)

    kv.reset_prefix_cache()

    kv.check()
    assert kv.match(2, PROMPT) == 0
    assert kv.match(3, [1, 2, 3, 4, 5]) == 4


@both
def test_a_cache_full_of_ended_sequences_still_has_room(make: MakeKv) -> None:
    kv = make()
    for sequence in range(20):
        start(kv, sequence, [sequence * 100 + place for place in range(30)])
        kv.free(sequence)
        kv.check()

    assert kv.used_tokens == 0
    assert kv.match(99, list(range(kv.max_tokens_per_sequence()))) == 0


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=16)


@both
@given(orders=st.lists(st.tuples(st.sampled_from("msaffk"), prompts), max_size=60))
def test_no_order_of_calls_breaks_an_invariant(
    make: MakeKv, orders: list[tuple[str, list[int]]]
) -> None:
    kv = make(48)
    live: dict[int, list[int]] = {}
    for sequence, (order, token_ids) in enumerate(orders):
        oldest = next(iter(live), None)
        if order == "m":
            num_cached = kv.match(sequence, token_ids)
            if num_cached is not None:
                assert num_cached < len(token_ids)
                live[sequence] = token_ids[:num_cached]
        elif oldest is None:
            continue
        elif order in "sa" and len(live[oldest]) + len(token_ids) <= 32:
            grown = live[oldest] + token_ids
            if kv.reserve(oldest, len(grown)) and order == "a":
                kv.append(oldest, token_ids)
                live[oldest] = grown
        elif order == "k":
            num_tokens = min(len(token_ids), len(live[oldest]))
            if kv.fork(oldest, sequence, num_tokens):
                live[sequence] = live[oldest][:num_tokens]
        elif order == "f":
            kv.free(oldest)
            del live[oldest]
        kv.check()
    for sequence in live:
        kv.free(sequence)
        kv.check()
    assert kv.used_tokens == 0
