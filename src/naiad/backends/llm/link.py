"""One engine process and its socket: spawned, loaded, ended and reaped. Nothing is restarted here."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from naiad.core.errors import InvalidModel, InvalidRequest, NaiadError, Unavailable
from naiad.engine.messages import Configure, Died, FromEngine, Loading, Ready
from naiad.engine.transport import FrameProtocol

ENGINE_COMMAND = (sys.executable, "-P", "-m", "naiad.engine.process")

Progress = Callable[[float, str], None]


class EngineLink:
    """One child process and its socket. While it loads, its messages decide `load`'s outcome.

    Args:
        process: The child, on the other end of `protocol`'s socket.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.protocol: FrameProtocol[FromEngine] = FrameProtocol(
            FromEngine, self._message, self._lost
        )
        self.on_message: Callable[[FromEngine], None] = self._loading_message
        self.on_lost: Callable[[EngineLink, Exception | None], None] = EngineLink._loading_lost
        self.is_lost = False
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._progress: Progress | None = None

    @staticmethod
    async def spawn(command: Sequence[str]) -> EngineLink:
        """Start a process; raises `Unavailable` when the system refuses one."""
        try:
            return await EngineLink._spawn(command)
        except OSError as error:  # out of processes, memory or files: it may have them later
            raise Unavailable(f"the engine process cannot be started: {error}") from error

    @staticmethod
    async def _spawn(command: Sequence[str]) -> EngineLink:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: ASYNC220, S603 - ms; must be this thread
                    [*command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            link = EngineLink(process)
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: link.protocol, sock=ours)
        except BaseException:
            ours.close()
            raise
        return link

    async def load(self, configure: Configure, progress: Progress | None) -> Ready:
        """Have it load; raises what it died of."""
        self._progress = progress
        self.protocol.send(configure)
        return await self._loaded

    async def end(self, grace_s: float) -> int:
        """Close the socket, which ends the process; kill it after `grace_s`; reap it."""
        self.protocol.abort()
        return await asyncio.to_thread(self._reap, grace_s)

    def _reap(self, grace_s: float) -> int:
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _message(self, message: FromEngine) -> None:
        self.on_message(message)

    def _lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.on_lost(self, exc)

    def _loading_message(self, message: FromEngine) -> None:
        if isinstance(message, Loading):
            if self._progress is not None:
                self._progress(message.fraction, message.text)
        elif not self._loaded.done():
            if isinstance(message, Ready):
                self._loaded.set_result(message)
            elif isinstance(message, Died):
                self._loaded.set_exception(_load_error(message))

    def _loading_lost(self, exc: Exception | None) -> None:
        if not self._loaded.done():
            error = Unavailable(
                "the engine process died while loading", hint="see its output above"
            )
            error.__cause__ = exc
            self._loaded.set_exception(error)


def _load_error(message: Died) -> NaiadError:
    """What was invalid while loading is the checkpoint, not a request."""
    error = message.error.to_error()
    if isinstance(error, InvalidRequest):
        return InvalidModel(str(error), hint=error.hint, **error.facts)
    return error
