"""What the front of the server can be told: addresses, limits, how long to drain."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP front of a server."""

    http_address: str = "0.0.0.0"  # noqa: S104 - as Triton: containers are reached from outside
    """Address to listen on, for requests and for metrics."""

    http_port: Port = 8000
    """Port of the inference protocols. 0: any free one."""

    metrics_port: Port = 8002
    """Port where only /metrics answers. 0: any free one."""

    allow_metrics: bool = True
    """Whether metrics are served at all, on either port."""

    http_max_input_size: Annotated[int, Meta(ge=1)] = 64 * 1024 * 1024
    """Largest request body, in bytes."""

    http_max_total_input_size: Annotated[int, Meta(ge=1)] = 512 * 1024 * 1024
    """Most bytes of request bodies held at once, of all requests together; the next gets 429."""

    body_timeout_s: Annotated[float, Meta(gt=0.0)] = 30.0
    """Longest a request body may take to arrive."""

    max_prompts: Annotated[int, Meta(ge=1)] = 128
    """Most prompts in one completion request."""

    max_concurrent_requests: Annotated[int, Meta(ge=1)] | None = None
    """Most inference requests at once; the next gets 429. Unset: the models' queues decide."""

    drain_timeout_s: Annotated[float, Meta(ge=0.0)] = 30.0
    """After SIGTERM, how long running requests may go on before they are ended."""

    keep_alive_timeout_s: Annotated[int, Meta(ge=1)] = 75
    """How long an idle connection is kept; longer than the proxies' in front (60 s is common)."""

    backlog_connections: Annotated[int, Meta(ge=1)] = 4096
    """Connections the kernel may hold before they are accepted."""
