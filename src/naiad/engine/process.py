"""The engine's process: `python -m naiad.engine.process FD PARENT_PID`.

Owns the life of the process and the loop that drives an engine; the engine itself is
`naiad.engine.engine`. The client spawns it (never forks: torch's threads do not survive a fork) with
one end of a socketpair as FD and sends `Configure`; the process answers with `Loading` messages, then
`Ready` or `Died`, then one `StepOutputs` per step.

It never outlives its client. SIGKILL of the client kills it through PR_SET_PDEATHSIG (which fires
when the spawning *thread* ends: spawn from one that lives as long as the process), and a closed
socket ends it. It ignores SIGINT and SIGTERM, which a terminal or a supervisor sends to the whole
group: the client drains first and then closes the socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from naiad.core.errors import InternalError, NaiadError, WireError
from naiad.engine.config import EngineConfig
from naiad.engine.messages import (
    Cancel,
    Configure,
    Died,
    EngineRequest,
    EngineStats,
    Loading,
    Ready,
    Rejected,
    StepOutputs,
    ToEngine,
)
from naiad.engine.transport import BlockingChannel, MessageTooLarge, PeerGone

_PR_SET_PDEATHSIG = 1
_MAX_FAILED_STEPS = 2
"""Steps that may raise in a row before the engine counts as broken. `Engine` answers for failures of
the model itself, and raises only once it has given up."""


class StepEngine(Protocol):
    """What the loop needs of `naiad.engine.engine.Engine`; tests bring a smaller one."""

    info: Ready

    def submit(self, request: EngineRequest) -> None:
        """Take a request; a refusal comes with the next step."""

    def cancel(self, request_id: int, index: int = -1) -> None:
        """Forget a request, or one answer of it."""

    def has_work(self) -> bool:
        """Whether a step would do something."""

    def step(self) -> StepOutputs:
        """Run one step."""

    def close(self) -> None:
        """Release everything."""


Progress = Callable[[float, str], None]
EngineFactory = Callable[[Path, EngineConfig, Progress], StepEngine]


def main(arguments: list[str], make_engine: EngineFactory) -> None:
    """Serve one client over the inherited socket until either ends."""
    fd, parent_pid = int(arguments[0]), int(arguments[1])
    _die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=fd) as sock:
        channel: BlockingChannel[ToEngine] = BlockingChannel(sock, ToEngine)
        with contextlib.suppress(PeerGone):
            serve(channel, make_engine)


def serve(channel: BlockingChannel[ToEngine], make_engine: EngineFactory) -> None:
    """Load what the client's first message says, then step until the client is gone.

    Raises:
        PeerGone: the client is gone; the normal end.
    """
    gc.disable()  # a fifth of the time to import torch is collections that find nothing
    try:
        first, *early = channel.receive(wait=True)
        if not isinstance(first, Configure):
            raise InternalError(f"the first message must be Configure, got {type(first).__name__}")
        engine = make_engine(
            Path(first.path), first.config, lambda done, text: channel.send(Loading(done, text))
        )
    except PeerGone:
        raise
    except Exception as error:  # noqa: BLE001 - whatever loading raises must reach the client
        _report_death(channel, error)
        return
    gc.collect()
    gc.freeze()  # weights, modules and tables stay: collections need not walk them
    gc.enable()
    channel.send(engine.info)
    try:
        _Loop(channel, engine).run(early)
    finally:
        engine.close()


class _Loop:
    """Messages in, steps out. Between steps it looks at the socket, without work it waits there."""

    def __init__(self, channel: BlockingChannel[ToEngine], engine: StepEngine) -> None:
        self._channel = channel
        self._engine = engine
        self._num_open: dict[int, int] = {}  # request id -> answers that have not ended
        self._num_failed_steps = 0
        self._stats = EngineStats()

    def run(self, messages: list[ToEngine]) -> None:
        """Until the client is gone (raises `PeerGone`) or the engine is broken (returns)."""
        while True:
            for message in messages:
                self._take(message)
            # A step after every message, even if nothing is left to do: it reports the new state.
            if messages or self._engine.has_work():
                try:
                    outputs = self._engine.step()
                    self._num_failed_steps = 0
                except Exception as error:  # noqa: BLE001 - one bad step must not end the process
                    self._num_failed_steps += 1
                    if self._num_failed_steps >= _MAX_FAILED_STEPS:
                        _report_death(self._channel, error)
                        return
                    outputs = self._fail_all(error)
                self._settle(outputs)
                self._report(outputs)
            messages = self._channel.receive(wait=not self._engine.has_work())

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, EngineRequest):
            self._num_open[message.id] = message.sampling.n
            self._engine.submit(message)
        elif isinstance(message, Cancel):
            if message.index < 0:
                self._num_open.pop(message.id, None)
            else:
                self._close_answer(message.id)
            self._engine.cancel(message.id, message.index)

    def _report(self, step: StepOutputs) -> None:
        """Send a step in as many messages as it takes; an answer too large for any fails alone."""
        try:
            self._channel.send(step)
            return
        except MessageTooLarge as error:
            if not step.outputs:
                raise
            cause = WireError.of(error)
        half, replace = len(step.outputs) // 2, msgspec.structs.replace
        if half:
            self._report(replace(step, outputs=step.outputs[:half]))
            self._report(StepOutputs(outputs=step.outputs[half:], stats=step.stats))
            return
        request_id = step.outputs[0].id
        self._num_open.pop(request_id, None)
        self._engine.cancel(request_id)
        rejected = [*step.rejected, Rejected(request_id, cause)]
        self._report(replace(step, outputs=[], rejected=rejected))

    def _settle(self, outputs: StepOutputs) -> None:
        """Remember which requests are still open, and the last statistics."""
        self._stats = outputs.stats
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._close_answer(output.id)
        for rejected in outputs.rejected:
            self._num_open.pop(rejected.id, None)

    def _close_answer(self, request_id: int) -> None:
        left = self._num_open.get(request_id, 0) - 1
        if left > 0:
            self._num_open[request_id] = left
        else:
            self._num_open.pop(request_id, None)

    def _fail_all(self, error: Exception) -> StepOutputs:
        """Which request broke the step is unknown, and so is the state of the others: end them all."""
        traceback.print_exception(error)
        wire = WireError.of(_engine_fault(error))
        rejected = [Rejected(request_id, wire) for request_id in self._num_open]
        for request_id in self._num_open:
            self._engine.cancel(request_id)
        return StepOutputs(rejected=rejected, stats=self._stats)


def _engine_fault(error: Exception) -> NaiadError:
    if isinstance(error, NaiadError):
        return error
    return InternalError(f"the engine's step failed: {type(error).__name__}: {error}")


def _report_death(channel: BlockingChannel[ToEngine], error: Exception) -> None:
    if not isinstance(error, NaiadError):
        traceback.print_exception(error)
    channel.send(Died(WireError.of(error)))
    channel.flush()


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, and end now if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("the parent died before this process had started")


def _load_engine(path: Path, config: EngineConfig, progress: Progress) -> StepEngine:
    progress(0.0, "importing torch")
    from naiad.engine.engine import Engine

    return Engine(path, config, progress)


if __name__ == "__main__":
    main(sys.argv[1:], _load_engine)
