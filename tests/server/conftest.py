"""A real server on a free loopback port, in the test's own event loop, before models that recite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest

from naiad.backends.scripted import ScriptedLanguageModel
from naiad.core.model import Model
from naiad.server.lifecycle import Server
from naiad.server.settings import ServerSettings

SCRIPT = ("Once", " upon", " a", " time", ", the", " end", ".")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


class Running:
    """A started server and clients for it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{server.port}"
        self.http = httpx2.AsyncClient(base_url=self.url, timeout=20)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20
        )

    async def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return await self.http.post(path, json=body, **options)


Start = Callable[..., AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def running(
    *models: Model, script: Sequence[str] = SCRIPT, **settings: Any
) -> AsyncIterator[Running]:
    """A server for the block; by default with one scripted model."""
    chosen = ServerSettings(
        **{"http_address": "127.0.0.1", "http_port": 0, "metrics_port": 0, **settings}
    )
    server = Server(models or (ScriptedLanguageModel(script),), chosen)
    await server.start()
    client = Running(server)
    try:
        yield client
    finally:
        await client.http.aclose()
        await client.openai.close()
        server.shut_down()
        server.shut_down()
        await server.run()


@pytest.fixture
def start() -> Start:
    """`async with start(model, setting=...) as running:`."""
    return running


@pytest.fixture
def model() -> ScriptedLanguageModel:
    return ScriptedLanguageModel(SCRIPT)
