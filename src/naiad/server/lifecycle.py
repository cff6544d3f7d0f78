"""A server from start to end: ports, readiness, signals, draining, closing the models.

The order of an end: readiness off and new inference refused, running requests finish or are ended
at the drain's limit, connections close, models close in reverse order of their start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from naiad.core.errors import InvalidSettings, Unavailable
from naiad.core.metrics import Registry
from naiad.core.model import Model
from naiad.server.admission import Admission
from naiad.server.http.app import HttpApp
from naiad.server.http.pages import make_metrics_app
from naiad.server.http.protocol import BoundedProtocol
from naiad.server.models import ModelTable
from naiad.server.settings import ServerSettings

_CLOSE_TIMEOUT_S = 5  # for replies that have been ended to leave, and connections to close
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("naiad.server")


class Server:
    """The listening ports in front of some models.

    Args:
        models: Loaded models; the server closes them at its end.
        settings: Addresses and limits.
        load_s: Seconds that loading took, by model name, where known.
        registry: Where others have registered metrics; the models' are added.
    """

    def __init__(
        self,
        models: Sequence[Model],
        settings: ServerSettings,
        *,
        load_s: Mapping[str, float] | None = None,
        registry: Registry | None = None,
    ) -> None:
        self.settings = settings
        self.table = ModelTable(models, load_s)
        self.admission = Admission(settings.max_concurrent_requests)
        self.registry = registry or Registry()
        self.table.register_metrics(self.registry)
        self._fronts: list[_Front] = []
        self.draining = asyncio.Event()
        """Set when the end has begun."""
        self._at_once = asyncio.Event()

    @property
    def port(self) -> int:
        """The HTTP port that is listening, also where the settings say 0."""
        return self._fronts[0].port

    @property
    def metrics_port(self) -> int:
        """The metrics port that is listening."""
        return self._fronts[1].port

    async def start(self) -> None:
        """Listen; returns once requests are answered. Raises `InvalidSettings` for a taken port."""
        settings = self.settings
        shown = self.registry if settings.allow_metrics else None
        app = HttpApp(self.table, self.admission, settings, shown)
        wanted: list[tuple[Any, int, str]] = [(app, settings.http_port, "--http-port")]
        if settings.allow_metrics:
            wanted.append(
                (make_metrics_app(self.registry), settings.metrics_port, "--metrics-port")
            )
        with contextlib.ExitStack() as bound:  # both ports or none
            sockets = [
                bound.enter_context(contextlib.closing(_bind(settings, port, flag)))
                for _, port, flag in wanted
            ]
            bound.pop_all()
        for (front_app, _, _), listener in zip(wanted, sockets, strict=True):
            front = _Front(front_app, settings, listener)
            self._fronts.append(front)
            await front.start()

    def shut_down(self) -> None:
        """Begin to drain; called again, end at once."""
        if self.draining.is_set():
            self._at_once.set()
        self.draining.set()
        self.admission.drain()

    async def run(self) -> None:
        """Serve until `shut_down`, then drain, close and return."""
        await self.draining.wait()
        _log.info("draining: %d requests are running", self.admission.num_running)
        await self._drain()
        await asyncio.gather(*(front.stop() for front in self._fronts))
        await self.close_models()

    async def close_models(self) -> None:
        """Close every model, the last one first."""
        for served in reversed(self.table.served):
            await served.model.close()

    async def _drain(self) -> None:
        if not await self._finished(self.settings.drain_timeout_s, self._at_once):
            _log.warning("ending %d requests that still run", self.admission.num_running)
            error = Unavailable(
                "the server is shutting down", hint="retry on another replica", retry_after_s=1
            )
            self.admission.interrupt_all(error)
            await self._finished(_CLOSE_TIMEOUT_S, asyncio.Event())

    async def _finished(self, timeout_s: float, unless: asyncio.Event) -> bool:
        """Wait until nothing runs; False if `timeout_s` passed or `unless` happened first."""
        idle = asyncio.create_task(self.admission.idle())
        stopped = asyncio.create_task(unless.wait())
        await asyncio.wait((idle, stopped), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        idle.cancel()
        return self.admission.num_running == 0


async def serve(
    models: Sequence[Model],
    settings: ServerSettings,
    *,
    load_s: Mapping[str, float] | None = None,
    registry: Registry | None = None,
    started: Callable[[Server], None] | None = None,
) -> None:
    """Serve `models` until SIGTERM or SIGINT; a second one ends running requests at once.

    Args:
        models: Loaded models; closed before this returns or raises.
        settings: Addresses and limits.
        load_s: Seconds that loading took, by model name, where known.
        registry: Where others have registered metrics.
        started: Called once the ports answer.

    Raises:
        InvalidSettings: a port is taken.
    """
    _allow_many_connections()
    server = Server(models, settings, load_s=load_s, registry=registry)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.shut_down)
    try:
        try:
            await server.start()
        except BaseException:
            await server.close_models()
            raise
        if started is not None:
            started(server)
        await server.run()
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


class _Front:
    """One uvicorn server on one socket."""

    def __init__(self, app: Any, settings: ServerSettings, listener: socket.socket) -> None:
        self._socket = listener
        self.port = int(listener.getsockname()[1])
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                loop="none",
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive_timeout_s,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
                backlog=settings.backlog_connections,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        await self._uvicorn.listening.wait()

    async def stop(self) -> None:
        self._uvicorn.leave()
        if self._task is not None:
            await self._task


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Close the connections and return from `serve`."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        # The original wakes ten times a second to renew the Date header, which is off.
        await self.on_tick(0)
        await self._leaving.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def _allow_many_connections() -> None:
    """Each takes a file descriptor, and the usual soft limit of 1,024 is there for `select` alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # not every sandbox lets one
        _log.warning("at most %d open files: connections beyond that are not accepted", soft)


def _bind(settings: ServerSettings, port: int, flag: str) -> socket.socket:
    address = settings.http_address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        bound = socket.create_server(
            (address, port), family=family, backlog=settings.backlog_connections
        )
    except OSError as error:
        raise InvalidSettings(
            f"cannot listen on {address}:{port}: {error.strerror or error}",
            hint=f"choose another port with {flag}, or stop what uses it",
        ) from None
    bound.setblocking(False)
    return bound
