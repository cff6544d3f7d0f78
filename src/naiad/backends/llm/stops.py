"""Find stop strings in text that arrives in pieces. Pure: no tokens, no clock.

Text is given out as early as it can be: only the shortest tail that may still become a stop string
is held back. However the text is cut into pieces, the result is that of searching all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Stopped(msgspec.Struct, frozen=True):
    """Text that may be given out now, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Looks for the match that ends first; of those that end together, the longest.

    That is the match a reader of the growing text sees first, and the only rule under which no
    text ever has to wait for a longer alternative.

    Args:
        stops: The strings; empty ones are ignored.
        include_stop: Whether the text given out ends with the stop string or before it.
    """

    __slots__ = ("_held", "_include_stop", "_stops")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(sorted({stop for stop in stops if stop}, key=len, reverse=True))
        self._include_stop = include_stop
        self._held = ""

    def feed(self, piece: str) -> Stopped:
        """Take the next piece. After a result with `stop`, do not feed again."""
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self._held = ""
            return Stopped(text[: start + len(stop) if self._include_stop else start], stop)
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return Stopped(text[: len(text) - keep])

    def flush(self) -> str:
        """The text ends here without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Start and string of the match whose end comes first."""
        best: tuple[int, str] | None = None
        best_end = len(text) + 1
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and start + len(stop) < best_end:
                best, best_end = (start, stop), start + len(stop)
        return best

    def _num_held(self, text: str) -> int:
        """Characters at the end that a stop string could begin with."""
        held = 0
        for stop in self._stops:  # all sizes together are no more than the stop strings' characters
            for size in range(min(len(stop) - 1, len(text)), held, -1):
                if stop.startswith(text[-size:]):
                    held = size
                    break
        return held
