"""The ASGI application of the HTTP port: hot routes picked by path, Starlette for the rest.

Every request becomes an `Exchange` here, every error a reply in its protocol's style, and every
reply a line in the access log.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from naiad.core.metrics import Registry
from naiad.server.admission import Admission, Disconnected
from naiad.server.http.errors import KSERVE
from naiad.server.http.exchange import (
    ErrorStyle,
    Exchange,
    Receive,
    Scope,
    Send,
    WrongMethod,
)
from naiad.server.http.intake import Intake
from naiad.server.http.kserve import KServeRoutes
from naiad.server.http.pages import make_pages
from naiad.server.models import ModelTable
from naiad.server.openai.errors import OPENAI
from naiad.server.openai.routes import OpenAIRoutes
from naiad.server.settings import ServerSettings

Handler = Callable[[Exchange], Awaitable[None]]

_log = logging.getLogger("naiad.server")


class HttpApp:
    """Everything that the HTTP port answers.

    Args:
        table: The models.
        admission: Who may run; draining shows in readiness.
        settings: Limits.
        registry: What /metrics shows; None: metrics are off.
    """

    def __init__(
        self,
        table: ModelTable,
        admission: Admission,
        settings: ServerSettings,
        registry: Registry | None,
    ) -> None:
        self._intake = Intake(admission, settings)
        openai = OpenAIRoutes(table, admission, self._intake, settings.max_prompts)
        self._kserve = KServeRoutes(table, admission, self._intake)
        self._pages = make_pages(table, admission, registry)
        self._posts: dict[str, Handler] = {}
        for prefix in ("/v1", "/openai/v1"):
            self._posts[f"{prefix}/chat/completions"] = openai.chat
            self._posts[f"{prefix}/completions"] = openai.completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        path: str = scope["path"]
        handler, style = self._route(path, scope["method"])
        try:
            await handler(exchange)
        except Disconnected:
            pass
        except Exception as error:  # noqa: BLE001 - every refusal reaches the client as a reply
            await exchange.fail(error, style)
        finally:
            self._intake.release(exchange)
            exchange.log()

    def _route(self, path: str, method: str) -> tuple[Handler, ErrorStyle]:
        handler = self._posts.get(path)
        if handler is not None:
            return handler if method == "POST" else _only_post, OPENAI
        if path.startswith("/v2/models/"):
            return self._kserve.answer, KSERVE
        style = OPENAI if path.startswith(("/v1/", "/openai/")) else KSERVE
        return self._page, style

    async def _page(self, exchange: Exchange) -> None:
        await self._pages(exchange.scope, exchange.receive, exchange.send)


async def _only_post(exchange: Exchange) -> None:
    method, path = exchange.scope["method"], exchange.scope["path"]
    raise WrongMethod(f"Method Not Allowed: {method} {path}", allow="POST")
