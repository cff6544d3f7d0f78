"""The host's clock, and the one that moves when told."""

from __future__ import annotations

import asyncio

import pytest

from naiad.core.clock import Clock, SystemClock, VirtualClock


def test_the_system_clock_sleeps_until_its_deadline() -> None:
    async def main(clock: Clock) -> int:
        deadline_ns = clock.now_ns() + 2_000_000
        await clock.sleep_until(deadline_ns)
        return clock.now_ns() - deadline_ns

    assert asyncio.run(main(SystemClock())) >= 0


def test_a_virtual_clock_wakes_sleepers_in_order_of_their_deadlines() -> None:
    async def main() -> list[tuple[str, int]]:
        clock = VirtualClock()
        woken: list[tuple[str, int]] = []

        async def sleeper(name: str, deadline_ns: int) -> None:
            await clock.sleep_until(deadline_ns)
            woken.append((name, clock.now_ns()))

        async with asyncio.TaskGroup() as group:
            group.create_task(sleeper("late", 30))
            group.create_task(sleeper("early", 10))
            group.create_task(sleeper("now", 0))
            await asyncio.sleep(0)
            await clock.advance_to(20)
            assert clock.next_deadline_ns() == 30
            await clock.advance_to(40)
        assert clock.next_deadline_ns() is None
        return woken

    assert asyncio.run(main()) == [("now", 0), ("early", 10), ("late", 30)]


def test_a_task_that_sleeps_again_is_woken_again_on_the_way() -> None:
    async def main() -> list[int]:
        clock = VirtualClock()
        ticks: list[int] = []

        async def ticker() -> None:
            for number in range(1, 4):
                await clock.sleep_until(10 * number)
                ticks.append(clock.now_ns())

        task = asyncio.create_task(ticker())
        await asyncio.sleep(0)
        await clock.advance_to(100)
        await task
        return ticks

    assert asyncio.run(main()) == [10, 20, 30]


def test_a_cancelled_sleeper_is_forgotten() -> None:
    async def main() -> int | None:
        clock = VirtualClock()
        task = asyncio.create_task(clock.sleep_until(10))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return clock.next_deadline_ns()

    assert asyncio.run(main()) is None


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="time cannot go back"):
        asyncio.run(VirtualClock(5).advance_to(4))
