"""Time as a dependency: one protocol, the host's clock, and one that only moves when told.

Policies take `now_ns` and need neither; the drivers around them take a `Clock`. Wall-clock dates
are not here: a stamp that leaves the host is made where it is sent.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in integer nanoseconds."""

    def now_ns(self) -> int:
        """The time; only differences mean anything."""
        ...

    async def sleep_until(self, deadline_ns: int) -> None:
        """Return once `now_ns() >= deadline_ns`; at once if it already is."""
        ...


class SystemClock:
    """The host's monotonic clock, the same for every process on it."""

    def now_ns(self) -> int:
        """`time.monotonic_ns`."""
        return time.monotonic_ns()

    async def sleep_until(self, deadline_ns: int) -> None:
        """Sleep on the running event loop."""
        while (left_ns := deadline_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - it may wake early
            await asyncio.sleep(left_ns / 1e9)


class VirtualClock:
    """A clock that moves only by `advance_to`: for tests and simulation."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._num_sleeps = 0  # breaks ties: equal deadlines wake in order of arrival

    def now_ns(self) -> int:
        """The time it was last advanced to."""
        return self._now_ns

    async def sleep_until(self, deadline_ns: int) -> None:
        """Wait until someone advances the clock to `deadline_ns`."""
        if deadline_ns <= self._now_ns:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_sleeps += 1
        heapq.heappush(self._sleepers, (deadline_ns, self._num_sleeps, woken))
        await woken

    def next_deadline_ns(self) -> int | None:
        """The earliest time anyone sleeps until; None if nobody does."""
        while self._sleepers and self._sleepers[0][2].done():  # cancelled while it slept
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] if self._sleepers else None

    async def advance_to(self, now_ns: int) -> None:
        """Move to `now_ns`, stopping at every deadline on the way so that sleepers run in order.

        A woken task runs until it next waits; one that sleeps again on the way is woken again.
        """
        if now_ns < self._now_ns:
            raise ValueError(f"time cannot go back from {self._now_ns} to {now_ns} ns")
        while (deadline_ns := self.next_deadline_ns()) is not None and deadline_ns <= now_ns:
            self._now_ns = max(self._now_ns, deadline_ns)
            heapq.heappop(self._sleepers)[2].set_result(None)
            await asyncio.sleep(0)  # let the woken task run
        self._now_ns = now_ns
