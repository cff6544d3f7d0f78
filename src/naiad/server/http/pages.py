"""The small GET routes: health, server metadata, model lists, metrics, version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import naiad
from naiad.core.language import LanguageModel
from naiad.core.metrics import CONTENT_TYPE, Registry
from naiad.server.admission import Admission
from naiad.server.http.exchange import Receive, Scope, Send
from naiad.server.models import ModelTable, ServedModel, UnknownModel
from naiad.server.openai.errors import OPENAI

Endpoint = Callable[[Request], Awaitable[Response]]

EXTENSIONS = ("model_configuration", "parameters", "statistics", "generate")
"""Of the KServe protocol's, those that work."""


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as a JSON reply."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def make_pages(table: ModelTable, admission: Admission, registry: Registry | None) -> Starlette:
    """The application that answers them; anything else is 404 or 405 in the path's style."""
    pages = _Pages(table, admission)
    routes: dict[str, Endpoint] = {
        "/v2": pages.server,
        "/v2/health/live": pages.live,
        "/v2/health/ready": pages.ready,
        "/health": pages.health,
        "/ping": pages.health,
        "/version": pages.version,
    }
    for prefix in ("/v1", "/openai/v1"):
        routes[f"{prefix}/models"] = pages.models
        routes[f"{prefix}/models/{{model:path}}"] = pages.model
    if registry is not None:
        routes["/metrics"] = metrics_endpoint(registry)
    return Starlette(
        routes=[
            Route(path, endpoint, methods=["GET", "HEAD"]) for path, endpoint in routes.items()
        ],
        exception_handlers={HTTPException: _refuse},
    )


def make_metrics_app(registry: Registry) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application of the metrics port: there, any path but /metrics is 200 and empty."""
    endpoint = metrics_endpoint(registry)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = await endpoint(request) if scope["path"] == "/metrics" else Response()
        await response(scope, receive, send)

    return app


def metrics_endpoint(registry: Registry) -> Endpoint:
    """Prometheus' text."""

    async def metrics(_request: Request) -> Response:
        return Response(registry.exposition(), headers={"content-type": CONTENT_TYPE})

    return metrics


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = str(error.detail)
    if request.url.path.startswith(("/v1/", "/openai/")):
        message = f"{text}: {request.method} {request.url.path}"
        body: Any = {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        }
    else:
        body = {"error": text}
    response = json_response(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


class _Pages:
    def __init__(self, table: ModelTable, admission: Admission) -> None:
        self._table = table
        self._admission = admission

    async def server(self, _request: Request) -> Response:
        return json_response(
            {"name": "naiad", "version": naiad.__version__, "extensions": EXTENSIONS}
        )

    async def live(self, _request: Request) -> Response:
        return Response(status_code=200)

    async def ready(self, _request: Request) -> Response:
        if self._admission.draining:
            return Response(status_code=503)
        return Response(status_code=200 if self._table.is_ready() else 400)

    async def health(self, _request: Request) -> Response:
        healthy = self._table.is_ready() and not self._admission.draining
        return Response(status_code=200 if healthy else 503)

    async def version(self, _request: Request) -> Response:
        return json_response({"version": naiad.__version__})

    async def models(self, _request: Request) -> Response:
        listed = [_describe(name, served) for name, served in self._table.names()]
        names = [served.metadata.name for served in self._table.served]
        return json_response({"object": "list", "data": listed, "models": names})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        try:
            served = self._table.find(name)
        except UnknownModel as error:
            return Response(
                OPENAI.body(error, ""), OPENAI.status(error), media_type="application/json"
            )
        ready = served.model.is_ready()
        return json_response({**_describe(name, served), "name": name, "ready": ready})


def _describe(name: str, served: ServedModel) -> dict[str, Any]:
    model = served.model
    described: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": model.created_s if isinstance(model, LanguageModel) else 0,
        "owned_by": "naiad",
        "root": served.metadata.name,
    }
    if isinstance(model, LanguageModel):
        described["max_model_len"] = model.max_model_len
    return described
