"""The HTTP application without a socket: for tests that own what the client does, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from naiad.core.metrics import Registry
from naiad.core.model import Model
from naiad.server.admission import Admission
from naiad.server.http.app import HttpApp
from naiad.server.models import ModelTable
from naiad.server.settings import ServerSettings


def make_app(*models: Model, **settings: Any) -> HttpApp:
    table = ModelTable(models)
    registry = Registry()
    table.register_metrics(registry)
    chosen = ServerSettings(**settings)
    return HttpApp(table, Admission(chosen.max_concurrent_requests), chosen, registry)


class Client:
    """One request; `sent` is what the application has sent so far."""

    def __init__(self, method: str, path: str, body: bytes = b"") -> None:
        self.scope: MutableMapping[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self._progress = asyncio.Event()
        self.sent: list[MutableMapping[str, Any]] = []

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)
        self._progress.set()

    async def has_sent(self, num_messages: int) -> None:
        while len(self.sent) < num_messages:
            self._progress.clear()
            await self._progress.wait()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def call(app: HttpApp, method: str, path: str, body: bytes = b"") -> Client:
    """Send one request and return when it has been answered."""
    client = Client(method, path, body)
    await app(client.scope, client.receive, client.send)
    return client
