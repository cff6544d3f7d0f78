"""How pages are shared, copied and evicted: one example for each rule."""

from __future__ import annotations

from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.hashing import ROOT, chain
from naiad.engine.kv.pages import PageManager

A, B, C, D = ([place * 10 + offset for offset in range(4)] for place in range(1, 5))


def store(kv: PageManager, sequence: int, token_ids: list[int]) -> list[int]:
    """Start, reserve and append; return the pages."""
    num_cached = kv.match(sequence, token_ids)
    assert num_cached is not None
    assert kv.reserve(sequence, len(token_ids))
    kv.append(sequence, token_ids[num_cached:])
    kv.check()
    return list(kv.block_table(sequence))


def test_full_pages_are_shared_and_counted_once() -> None:
    kv = PageManager(8, 4)
    first = store(kv, 0, A + B + C)
    second = store(kv, 1, A + B + D)

    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert kv.used_tokens == 16


def test_a_page_behind_another_prefix_is_not_shared() -> None:
    kv = PageManager(8, 4)
    store(kv, 0, A + C)

    assert kv.match(1, B + C + D) == 0


def test_an_ended_tail_is_continued_in_its_own_page() -> None:
    kv = PageManager(8, 4)
    pages = store(kv, 0, A + B[:2])
    kv.free(0)

    assert store(kv, 1, A + B[:2] + [7]) == pages
    assert kv.take_copies() == []


def test_a_longer_tail_is_copied_and_stays_matchable() -> None:
    kv = PageManager(8, 4)
    pages = store(kv, 0, A + B)
    kv.free(0)

    assert kv.match(1, [*A, B[0], 7, 7]) == 5
    assert kv.take_copies() == [KvCopy(pages[1], kv.block_table(1)[1], 1)]
    assert kv.match(2, A + B + C) == 8


def test_the_last_free_page_is_cut_rather_than_copied() -> None:
    kv = PageManager(3, 4)
    store(kv, 9, D)
    pages = store(kv, 0, A + B)
    kv.free(0)

    assert store(kv, 1, [*A, B[0], 7, 7]) == pages
    assert kv.take_copies() == []
    kv.free(1)
    kv.free(9)
    assert kv.match(2, [*A, *B, 8]) == 5  # what was cut off is not believed to be there


def test_the_least_recently_used_prefix_is_evicted_leaf_first() -> None:
    kv = PageManager(4, 4)
    store(kv, 0, A + B)
    kv.free(0)
    store(kv, 1, C + D)
    kv.free(1)

    store(kv, 2, [7])  # takes the page of B

    assert kv.match(3, C + D + [7]) == 8
    kv.free(3)
    kv.free(2)
    assert kv.match(4, A + B + [7]) == 4


def test_the_same_tokens_computed_twice_are_kept_once() -> None:
    kv = PageManager(8, 4)
    for sequence in (0, 1):
        assert kv.match(sequence, A + B[:2]) == 0
        assert kv.reserve(sequence, 6)
    for sequence in (0, 1):
        kv.append(sequence, A + B[:2])
    kv.free(0)
    kv.free(1)
    kv.check()

    assert kv.match(2, list(range(200, 224))) == 0  # six pages were never needed
    kv.free(2)
    assert kv.match(3, A + B) == 6


def test_short_tails_of_large_pages_are_computed_again() -> None:
    kv = PageManager(8, 64)
    store(kv, 0, list(range(40)))

    assert kv.match(1, [*range(15), 99]) == 0
    kv.free(1)
    assert kv.match(1, [*range(16), 99]) == 16


def test_digests_are_the_same_everywhere_and_cover_the_whole_past() -> None:
    assert chain(ROOT, [1, 2]).hex() == "2cc5e4d47c5f3c5fbe635a5a5b7bb392"
    assert chain(chain(ROOT, [1]), [2]) != chain(ROOT, [1, 2])
