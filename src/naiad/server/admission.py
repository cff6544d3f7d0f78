"""Which requests may run, and how a running one is ended from outside.

Every inference, whatever its protocol, runs inside `Admission.admit`. That block ends early when
its client disconnects or when the server has to go; the model's iterator is closed on the way out,
which frees what the request held. This module knows neither HTTP statuses nor models.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType

from naiad.core.errors import Cancelled, NaiadError, QueueFull, Unavailable


class Disconnected(Cancelled):
    """The client went away; nobody is left to read a reply."""


class Admission:
    """The requests that run now, and whether more may begin.

    Args:
        max_running: Most requests at once; None: as many as the models' own queues take.
    """

    def __init__(self, max_running: int | None = None) -> None:
        self._max_running = max_running
        self._running: set[RunningRequest] = set()
        self._arriving: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def num_running(self) -> int:
        """Requests between arrival and their last byte."""
        return len(self._running)

    @property
    def num_arriving(self) -> int:
        """Requests whose body is still on its way."""
        return len(self._arriving)

    @contextlib.asynccontextmanager
    async def arriving(self, timeout_s: float) -> AsyncIterator[None]:
        """A block for the arrival of one body: `TimeoutError` after a while, or when draining."""
        async with asyncio.timeout(timeout_s) as deadline:
            self._arriving.add(deadline)
            try:
                yield
            finally:
                self._arriving.discard(deadline)

    def drain(self) -> None:
        """Let nothing more begin; what is still arriving has not begun."""
        self.draining = True
        now_s = asyncio.get_running_loop().time()
        for deadline in self._arriving:
            if not deadline.expired():
                deadline.reschedule(now_s)

    def check(self) -> None:
        """Raise what a request that arrives now should be told, if it may not begin."""
        if self.draining:
            raise Unavailable(
                "the server is shutting down", hint="retry on another replica", retry_after_s=1
            )
        if self._max_running is not None and self.num_running >= self._max_running:
            raise QueueFull(
                f"{self.num_running} requests are running, the limit is {self._max_running}",
                hint="retry after a pause, or raise --max-concurrent-requests",
                limit=self._max_running,
                retry_after_s=1,
            )

    def admit(self, wait_for_disconnect: Callable[[], Awaitable[None]]) -> RunningRequest:
        """A block for one request: `async with admission.admit(exchange.disconnected):`."""
        return RunningRequest(self, wait_for_disconnect)

    def interrupt_all(self, error: NaiadError) -> None:
        """End every running request with `error`."""
        for request in list(self._running):
            request.interrupt(error)

    async def idle(self) -> None:
        """Return once nothing runs."""
        await self._idle.wait()

    def _enter(self, request: RunningRequest) -> None:
        self.check()
        self._running.add(request)
        self._idle.clear()

    def _leave(self, request: RunningRequest) -> None:
        self._running.discard(request)
        if not self._running:
            self._idle.set()


class RunningRequest:
    """The block of one request; like `asyncio.timeout`, but ended by an event.

    Inside, the end appears as `CancelledError` at whatever is awaited; the block itself raises the
    error given to `interrupt`, or `Disconnected`.
    """

    __slots__ = ("_admission", "_ended_by", "_task", "_wait", "_watcher")

    def __init__(self, admission: Admission, wait: Callable[[], Awaitable[None]]) -> None:
        self._admission = admission
        self._wait = wait
        self._ended_by: NaiadError | None = None
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RunningRequest:
        self._admission._enter(self)
        self._task = asyncio.current_task()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self

    def interrupt(self, error: NaiadError) -> None:
        """End the block with `error`; the first reason wins."""
        if self._task is not None and self._ended_by is None:
            self._ended_by = error
            self._task.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        if self._watcher is not None:
            self._watcher.cancel()
        self._admission._leave(self)
        if self._ended_by is None or task is None:
            return
        # Ours only if nobody else cancelled the task meanwhile.
        if task.uncancel() == 0 and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise self._ended_by from None

    async def _watch(self) -> None:
        await self._wait()
        self.interrupt(Disconnected("the client disconnected"))
