"""One HTTP request and its reply, over raw ASGI: one-piece or streamed. Bodies: `http.intake`.

It also remembers what the access log says of the request. Which error becomes which status is the
protocols' business (`http.errors`, `openai.errors`); `ErrorStyle` is the form in which they tell.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from naiad.core.errors import InternalError, InvalidRequest, Kind, NaiadError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
CLIENT_CLOSED = 499  # nginx's number for a client that left; only the log sees it

_log = logging.getLogger("naiad.server")
_access_log = logging.getLogger("naiad.access")
_encode = msgspec.json.Encoder().encode
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class WrongMethod(InvalidRequest):
    """The path takes other methods. Facts: `allow`, those it takes, with commas between."""


class ErrorStyle(msgspec.Struct, frozen=True):
    """How one protocol says that something went wrong."""

    status: Callable[[NaiadError], int]
    body: Callable[[NaiadError, str], bytes]
    """JSON for an error and the request id."""
    after_event: bytes = b""
    """What follows the event of an error in a stream."""


class Exchange:
    """One request, from its headers to the last byte of the reply."""

    __slots__ = (
        "_arrival_ns",
        "_began",
        "_ended",
        "_receive",
        "_send",
        "model",
        "num_body_bytes",
        "num_input_tokens",
        "num_output_tokens",
        "num_reply_bytes",
        "request_id",
        "scope",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._arrival_ns = time.monotonic_ns()
        self._began = False
        self._ended = False
        given = self.header(b"x-request-id")
        sane = given is not None and _SANE_ID.fullmatch(given) is not None
        self.request_id = given.decode() if given and sane else secrets.token_hex(16)
        self.status = 0
        self.model = ""
        self.num_body_bytes = 0
        self.num_reply_bytes = 0
        self.num_input_tokens = 0
        self.num_output_tokens = 0

    @property
    def began(self) -> bool:
        """Whether the status has been sent and can no longer change."""
        return self._began

    def header(self, name: bytes) -> bytes | None:
        """The first header called `name` (lower case)."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return None

    async def disconnected(self) -> None:
        """Return when the client has gone; only after the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(
        self,
        status: int,
        body: bytes = b"",
        *,
        content_type: bytes = JSON,
        headers: tuple[Header, ...] = (),
    ) -> None:
        """Send a whole reply."""
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", content_type), length, *headers])
        await self._finish(body)

    async def start_stream(self) -> Send:
        """Send the head of an event stream, and return what sends ASGI messages of its body.

        The caller adds the bytes it sends to `num_reply_bytes`: on the way of every token, one more
        coroutine to count them would cost a tenth of the budget.
        """
        await self._start(
            200,
            [
                (b"content-type", EVENT_STREAM),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )
        return self._send

    async def end_stream(self, last: bytes = b"") -> None:
        """Send the last piece of a streamed reply."""
        await self._finish(last)

    async def fail(self, error: Exception, style: ErrorStyle) -> None:
        """Tell the client about `error`: as the reply, or as the last event of a stream."""
        known = self.describe(error)
        body = style.body(known, self.request_id)
        if self._ended:
            return
        if self._began:
            await self._finish(b"data: " + body + b"\n\n" + style.after_event)
            return
        headers: tuple[Header, ...] = ()
        if known.kind in (Kind.OVERLOADED, Kind.UNAVAILABLE):
            pause_s = math.ceil(float(known.facts.get("retry_after_s", 1)))
            headers = ((b"retry-after", b"%d" % max(pause_s, 1)),)
        elif known.kind is Kind.TIMED_OUT:  # of a body that still comes, nobody reads the rest
            headers = ((b"connection", b"close"),)
        elif isinstance(known, WrongMethod):
            headers = ((b"allow", str(known.facts["allow"]).encode()),)
        await self.reply(style.status(known), body, headers=headers)

    def describe(self, error: Exception) -> NaiadError:
        """`error` as one that can be told; what the client must not see goes to the log."""
        known = (
            error
            if isinstance(error, NaiadError)
            else InternalError(f"{type(error).__name__}: {error}")
        )
        if known.kind is Kind.INTERNAL:
            _log.error("request %s failed: %s", self.request_id, known.explain(), exc_info=error)
        return known

    async def send(self, message: Message) -> None:
        """ASGI's `send` for applications that know no exchange: adds the request id, counts."""
        if message["type"] == "http.response.start":
            self._began = True
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        else:
            self.num_reply_bytes += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def receive(self) -> Message:
        """ASGI's `receive`, for the same."""
        return await self._receive()

    def log(self) -> None:
        """Write the access log line."""
        if not _access_log.isEnabledFor(logging.INFO):
            return
        line = {
            "time": round(time.time(), 3),
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status or CLIENT_CLOSED,
            "ms": (time.monotonic_ns() - self._arrival_ns) // 10_000 / 100,
            "request_id": self.request_id,
            "bytes_in": self.num_body_bytes,
            "bytes_out": self.num_reply_bytes,
        }
        if self.model:
            line["model"] = self.model
        if self.num_input_tokens:
            line["num_input_tokens"] = self.num_input_tokens
            line["num_output_tokens"] = self.num_output_tokens
        _access_log.info("%s", _encode(line).decode())

    async def _start(self, status: int, headers: list[Header]) -> None:
        self._began = True
        self.status = status
        headers.append((b"x-request-id", self.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _finish(self, body: bytes) -> None:
        self._ended = True
        self.num_reply_bytes += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
