"""The sequences that wait, in the order in which they start.

Order is a deadline: time of arrival plus priority times the aging time, so that a priority one better
is worth one aging time of waiting, and whoever waits long enough comes before any newer request. The
deadline never changes, which makes order total and starvation impossible, and a heap sufficient.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from naiad.engine.scheduler.sequence import State

if TYPE_CHECKING:
    from naiad.engine.scheduler.sequence import Sequence

_MAX_DEAD = 64
"""Cancelled entries tolerated in the heap before it is rebuilt (or as many as live, if more)."""


class WaitingQueue:
    """A heap by `Sequence.order`. Ended sequences are skipped: say `discard` once for each."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._num_live = 0

    def __len__(self) -> int:
        return self._num_live

    def push(self, sequence: Sequence) -> None:
        """Enter a WAITING sequence; a preempted one comes back to where its order puts it."""
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._num_live += 1

    def peek(self) -> Sequence | None:
        """The next to start, or None."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence.state is State.WAITING:
                return sequence
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """Take what `peek` returned."""
        self._num_live -= 1
        return heapq.heappop(self._heap)[1]

    def discard(self) -> None:
        """One of the entries has left the state WAITING without `pop`."""
        self._num_live -= 1
        if len(self._heap) > 2 * self._num_live + _MAX_DEAD:
            self._heap = [entry for entry in self._heap if entry[1].state is State.WAITING]
            heapq.heapify(self._heap)
