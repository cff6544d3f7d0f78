"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from naiad.backends.llm.stops import StopMatcher, Stopped


def run(matcher: StopMatcher, pieces: list[str]) -> Stopped:
    """All text given out, and the stop string found."""
    text = ""
    for piece in pieces:
        found = matcher.feed(piece)
        text += found.text
        if found.stop is not None:
            return Stopped(text, found.stop)
    return Stopped(text + matcher.flush())


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["\n\nUser"])

    assert matcher.feed("Hello.\n") == Stopped("Hello.")
    assert matcher.feed("World\n\nU") == Stopped("\nWorld")
    assert matcher.feed("nit") == Stopped("\n\nUnit")
    assert matcher.feed(" one") == Stopped(" one")


def test_gives_out_what_was_held_back_when_the_text_ends() -> None:
    matcher = StopMatcher(["END"])

    assert matcher.feed("the EN") == Stopped("the ")
    assert matcher.flush() == "EN"


@pytest.mark.parametrize(("include", "text"), [(False, "a "), (True, "a STOP")])
def test_the_stop_string_is_part_of_the_output_only_if_asked_for(include: bool, text: str) -> None:
    assert run(StopMatcher(["STOP"], include_stop=include), ["a ST", "OP b"]) == Stopped(
        text, "STOP"
    )


def test_the_match_that_ends_first_wins() -> None:
    assert run(StopMatcher(["abcd", "bc"]), ["xabcd"]) == Stopped("xa", "bc")


def test_of_matches_that_end_together_the_longest_wins() -> None:
    assert run(StopMatcher(["c", "abc"]), ["xabc"]) == Stopped("x", "abc")


def test_empty_stop_strings_are_ignored() -> None:
    assert run(StopMatcher([""]), ["abc"]) == Stopped("abc")


LETTERS = st.text("ab", max_size=12)


@given(
    text=LETTERS,
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    data=st.data(),
)
def test_however_the_text_is_cut_the_result_is_that_of_searching_all_of_it(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]

    assert run(StopMatcher(stops, include_stop=include), pieces) == search(text, stops, include)


def search(text: str, stops: list[str], include: bool) -> Stopped:
    """The specification: the first end of a match, there the earliest start."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return Stopped(text[: end if include else end - len(stop)], stop)
    return Stopped(text)


@given(text=LETTERS, stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    found = matcher.feed(text)
    if found.stop is None:
        held = text[len(found.text) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_many_long_stop_strings_cost_no_more_than_their_characters() -> None:
    stops = ["a" * 12_000 + "!", *("a" * 60 + chr(1000 + number) for number in range(63))]
    matcher = StopMatcher(stops)

    begun_s = time.process_time()
    found = [matcher.feed("a" * 11_999 + "b") for _ in range(8)]
    used_s = time.process_time() - begun_s

    assert {len(piece.text) for piece in found} == {12_000}
    assert used_s < 0.2
