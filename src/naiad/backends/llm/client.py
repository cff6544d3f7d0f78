"""The server's side of an engine process: start it, talk to it, notice its death, start it again.

`EngineClient` speaks token ids in `engine.messages`; text is `backends.llm.model`'s business. It
lives on one event loop. Spawning ties the engine's life to the calling thread (see
`naiad.engine.process`): run the loop in the main thread.

States: STARTING (the first load), READY, RESTARTING (died; a new process loads, requests wait a
bounded time), FAILED (died too often in a row, stays down), CLOSED. A request in flight when the
engine dies fails at once; it is never sent again, because it may be what killed the engine. An
engine that has work and stays silent is killed, and then has died like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from naiad.backends.llm.link import ENGINE_COMMAND, EngineLink, Progress
from naiad.core.errors import InternalError, NaiadError, QueueFull, Unavailable
from naiad.engine.config import EngineConfig, PositiveInt
from naiad.engine.messages import (
    Cancel,
    Configure,
    Died,
    EngineRequest,
    EngineStats,
    FromEngine,
    Ready,
    SequenceOutput,
    StepOutputs,
)

logger = logging.getLogger(__name__)

_DEATH_GRACE_S = 1.0
"""How long a process that has closed its socket may take to end, before it is killed."""
_MIN_WATCH_S = 0.01


class Supervision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How patient the client is with its engine process."""

    restart_wait_s: float = 30.0
    """How long a request waits for a restarting engine before it is refused."""
    stall_timeout_s: float = 120.0
    """An engine that has work and reports no step for this long is ended and started again."""
    max_quick_deaths: PositiveInt = 5
    """Deaths in a row, each within `quick_death_s` of being ready, after which it stays down."""
    quick_death_s: float = 60.0
    first_backoff_s: float = 0.5
    """Pause before the second restart in a row; doubles each time. The first comes at once."""
    max_backoff_s: float = 30.0
    exit_grace_s: float = 5.0
    """How long `close` waits for the process to end by itself before it is killed."""


DEFAULT_SUPERVISION = Supervision()


class Sink(Protocol):
    """Who asked; called on the event loop."""

    def feed(self, output: SequenceOutput, now_ns: int) -> None:
        """The next tokens of one answer."""

    def fail(self, error: NaiadError) -> None:
        """The request has ended without its answers; nothing more will come."""


class State(enum.Enum):
    """Where the engine process is in its life."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


class EngineClient:
    """One engine process and the requests it is working on.

    Args:
        path: The checkpoint's folder.
        config: Sent to the engine as it is.
        supervision: Time-outs and restarts.
        progress: Called during the first load with the fraction done and what is being done.
        on_step: Called with every step's report after its outputs have been delivered.
        command: Starts the process; the socket's descriptor and our pid are appended.
    """

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        *,
        supervision: Supervision = DEFAULT_SUPERVISION,
        progress: Progress | None = None,
        on_step: Callable[[StepOutputs, int], None] | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._configure = Configure(path=str(path), config=config)
        self._supervision = supervision
        self._progress = progress
        self._on_step = on_step
        self._command = tuple(command)
        self._state = State.STARTING
        self._info: Ready | None = None
        self._link: EngineLink | None = None
        self._sinks: dict[int, Sink] = {}
        self._ids = itertools.count(1)
        self._num_waiting_restart = 0
        self._ready = asyncio.Event()  # set unless STARTING or RESTARTING
        self._restart: asyncio.Task[None] | None = None
        self._reaping: asyncio.Task[int] | None = None
        self._num_quick_deaths = 0
        self._load_s = 0.0
        self._ready_ns = 0
        self._heard_ns = 0
        self.stats = EngineStats()
        self.num_restarts = 0

    @property
    def state(self) -> State:
        """Where the engine process is in its life."""
        return self._state

    @property
    def info(self) -> Ready:
        """What the engine said of itself; only after `start`."""
        assert self._info is not None, "start() has not returned"
        return self._info

    @property
    def pid(self) -> int | None:
        """The engine's process id, if there is a process."""
        return self._link.process.pid if self._link is not None else None

    @property
    def load_s(self) -> float:
        """How long the last start took, from spawn to ready."""
        return self._load_s

    @property
    def num_in_flight(self) -> int:
        """Requests sent and not ended."""
        return len(self._sinks)

    def is_ready(self, now_ns: int | None = None) -> bool:
        """Whether the engine is up and, if it has work, has reported a step lately."""
        return self._state is State.READY and not self.is_stalled(now_ns)

    def is_stalled(self, now_ns: int | None = None) -> bool:
        """Whether the engine has had work and been silent for `stall_timeout_s`."""
        if not self._sinks or self._state is not State.READY:
            return False
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        return now_ns - self._heard_ns > self._supervision.stall_timeout_s * 1e9

    async def start(self) -> Ready:
        """Start the process and wait until it has loaded.

        Raises:
            InvalidModel: the checkpoint cannot be loaded as it is.
            Unavailable: the process died while loading.
        """
        try:
            await self._launch()
        except BaseException:
            await self.close()
            raise
        return self.info

    def new_id(self) -> int:
        """An id for the next request."""
        return next(self._ids)

    async def open(self, request: EngineRequest, sink: Sink) -> None:
        """Send a request; its outputs go to `sink` until it has ended, failed or been closed.

        Waits while the engine restarts, at most `restart_wait_s`. The caller closes the request
        with `close_request` when it has seen the last output, or wants no more.

        Raises:
            QueueFull: more requests in flight than the engine could even queue.
            Unavailable: the engine is down, was not back in time, or no longer reports steps.
        """
        if self._state is not State.READY:
            await self._wait_ready()
        if self.is_stalled():
            raise Unavailable(
                self._stall_text(),
                hint="retry on another replica, or later: the engine is restarted",
                retry_after_s=self._retry_after_s(),
            )
        self._check_bound(len(self._sinks))
        assert self._link is not None
        if not self._sinks:
            self._heard_ns = time.monotonic_ns()  # silence counts from when there is work
        self._sinks[request.id] = sink
        self._link.protocol.send(request)

    def cancel_answer(self, request_id: int, index: int) -> None:
        """Have the engine forget one answer; the request stays open for the others."""
        if request_id in self._sinks and self._link is not None:
            self._link.protocol.send(Cancel(request_id, index))

    def close_request(self, request_id: int, *, ended: bool) -> None:
        """Nothing more is wanted of this request; unless it has `ended`, the engine drops it."""
        sink = self._sinks.pop(request_id, None)
        if sink is not None and not ended and self._link is not None:
            self._link.protocol.send(Cancel(request_id))

    async def close(self) -> None:
        """End the process and reap it; requests in flight fail with `Unavailable`. Idempotent."""
        self._set_state(State.CLOSED)
        if self._restart is not None:
            self._restart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restart
        link, self._link = self._link, None
        self._fail_in_flight(Unavailable("the model is being unloaded"))
        if self._reaping is not None:
            await self._reaping
        if link is not None:
            await link.end(self._supervision.exit_grace_s)

    # ---- requests

    def _check_bound(self, num_requests: int) -> None:
        """The engine bounds its queue itself; this bounds what an engine in mid-step is sent."""
        limit = self._configure.config.max_queued_requests + self.info.max_num_seqs
        if num_requests >= limit:
            raise QueueFull(
                f"{num_requests} requests are in flight, the model takes {limit}",
                hint="retry later, or raise max_queued_requests",
                limit=limit,
                retry_after_s=1,
            )

    async def _wait_ready(self) -> None:
        self._check_bound(self._num_waiting_restart)
        self._num_waiting_restart += 1
        try:
            async with asyncio.timeout(self._supervision.restart_wait_s):
                await self._ready.wait()
        except TimeoutError:
            raise Unavailable(
                f"the engine was not back after {self._supervision.restart_wait_s:g} s",
                hint="retry later",
                retry_after_s=self._retry_after_s(),
            ) from None
        finally:
            self._num_waiting_restart -= 1
        if self._state is not State.READY:
            raise Unavailable(f"the engine is {self._state.value}", hint="see the server's log")

    def _fail_in_flight(self, error: NaiadError) -> None:
        sinks = list(self._sinks.values())
        self._sinks.clear()
        for sink in sinks:
            sink.fail(error)

    def _retry_after_s(self) -> int:
        return max(1, round(self._load_s + 0.5))

    # ---- what the engine says

    def _on_message(self, message: FromEngine) -> None:
        """One message of the ready engine: the hot path, once per step."""
        if type(message) is not StepOutputs:
            if isinstance(message, Died):
                logger.error("engine process gives up: %s", message.error.message)
            return
        now_ns = self._heard_ns = time.monotonic_ns()
        self.stats = message.stats
        sinks = self._sinks
        for output in message.outputs:
            sink = sinks.get(output.id)
            if sink is not None:
                try:
                    sink.feed(output, now_ns)
                except Exception as error:  # one request's fault must not take the link down
                    logger.exception("request %d failed on an output", output.id)
                    self.close_request(output.id, ended=False)
                    sink.fail(InternalError(f"{type(error).__name__}: {error}"))
        for rejected in message.rejected:
            sink = sinks.pop(rejected.id, None)
            if sink is not None:
                sink.fail(rejected.error.to_error())
        if self._on_step is not None:
            self._on_step(message, now_ns)

    def _on_lost(self, link: EngineLink, exc: Exception | None) -> None:
        """The ready engine's socket closed."""
        if link is not self._link:
            return
        reason = f" ({exc})" if exc is not None else ""
        self._restart_instead_of(
            link, f"died{reason}", "the engine process died while it worked on this request"
        )

    def _watch(self, link: EngineLink, silent_since_ns: int = 0) -> None:
        """Time and again while `link` is the engine's: end an engine that is stalled.

        Only on the second look: after a pause of this process, what the engine has sent may not
        have been read yet.
        """
        if link is not self._link:
            return
        if self.is_stalled():
            if silent_since_ns == self._heard_ns:
                link.process.kill()
                self._restart_instead_of(link, "stalled", self._stall_text())
                return
            silent_since_ns = self._heard_ns
        pause_s = max(self._supervision.stall_timeout_s / 4, _MIN_WATCH_S)
        asyncio.get_running_loop().call_later(pause_s, self._watch, link, silent_since_ns)

    def _stall_text(self) -> str:
        return f"the engine has reported no step for {self._supervision.stall_timeout_s:g} s"

    def _restart_instead_of(self, link: EngineLink, what: str, told: str) -> None:
        """Fail every request with `told`, reap the process and start another."""
        self._link = None
        self.stats = EngineStats()
        quick = time.monotonic_ns() - self._ready_ns < self._supervision.quick_death_s * 1e9
        self._num_quick_deaths = self._num_quick_deaths + 1 if quick else 1
        self._set_state(State.RESTARTING)
        logger.error(
            "engine process %d %s with %d requests in flight; restarting",
            link.process.pid,
            what,
            len(self._sinks),
        )
        self._fail_in_flight(
            Unavailable(
                told,
                hint="retry; the engine is being restarted",
                retry_after_s=self._retry_after_s(),
            )
        )
        loop = asyncio.get_running_loop()
        self._reaping = loop.create_task(link.end(_DEATH_GRACE_S))
        self._restart = loop.create_task(self._restart_after(self._reaping))

    async def _restart_after(self, reaping: asyncio.Task[int]) -> None:
        """Once the dead process is gone, start new ones until one is ready or too many have died."""
        supervision = self._supervision
        logger.error("engine process ended: %s", _ending(await asyncio.shield(reaping)))
        while self._num_quick_deaths <= supervision.max_quick_deaths:
            pause_s = supervision.first_backoff_s * 2 ** (self._num_quick_deaths - 2)
            if self._num_quick_deaths > 1:
                await asyncio.sleep(min(pause_s, supervision.max_backoff_s))
            try:
                await self._launch()
            except Exception as error:  # noqa: BLE001 - or requests would wait for it for ever
                self._num_quick_deaths += 1
                reason = error.explain() if isinstance(error, NaiadError) else repr(error)
                logger.error("engine process did not come back: %s", reason)
            else:
                self.num_restarts += 1
                logger.warning("engine process is back after %.1f s", self._load_s)
                return
        logger.error("engine process died %d times in a row; giving up", self._num_quick_deaths)
        self._set_state(State.FAILED)

    # ---- the process

    async def _launch(self) -> None:
        """Spawn, configure and wait for `Ready`; then route messages to the requests."""
        began_ns = time.monotonic_ns()
        link = self._link = await EngineLink.spawn(self._command)
        try:
            self._info = await link.load(self._configure, self._progress)
            if link.is_lost:
                raise Unavailable("the engine process died as soon as it had loaded")
        except BaseException:
            self._link = None
            await asyncio.shield(link.end(0.0))
            raise
        self._progress = None  # a restart is told by the log, not by a progress bar
        link.on_message = self._on_message
        link.on_lost = self._on_lost
        self._ready_ns = self._heard_ns = time.monotonic_ns()
        self._load_s = (self._ready_ns - began_ns) / 1e9
        self._set_state(State.READY)
        self._watch(link)

    def _set_state(self, state: State) -> None:
        self._state = state
        if state in (State.STARTING, State.RESTARTING):
            self._ready.clear()
        else:
            self._ready.set()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
