"""Request bodies on their way in: bounded in size each, in bytes together and in time.

Every route that takes a body reads it here, and decodes it here as well, so that a large one does
not keep the event loop from other requests. What a body means is the protocols' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from naiad.core.errors import QueueFull, TimedOut, TooLarge, Unsupported
from naiad.server.admission import Admission, Disconnected
from naiad.server.http.exchange import Exchange
from naiad.server.settings import ServerSettings

MAX_INLINE_BYTES = 32 * 1024
"""Larger bodies are decoded in a thread: this much takes a millisecond or less."""

Decoded = TypeVar("Decoded")


class BodyTimedOut(TimedOut):
    """The client did not send its body in time."""


class Intake:
    """Reads the bodies of all requests.

    Args:
        admission: Asked before reading: a draining server takes in nothing more.
        settings: The limits.
    """

    def __init__(self, admission: Admission, settings: ServerSettings) -> None:
        self._admission = admission
        self._limit_bytes = settings.http_max_input_size
        self._total_limit_bytes = settings.http_max_total_input_size
        self._timeout_s = settings.body_timeout_s
        self._num_held_bytes = 0

    async def read(self, exchange: Exchange) -> bytes:
        """The whole body; it counts as held until `release`.

        Raises:
            TooLarge: it is announced to be, or grows, over the limit.
            QueueFull: all bodies together would.
            BodyTimedOut: its end did not come in time.
            Unavailable: the server is draining, or began to before its end.
            Unsupported: it is compressed.
            Disconnected: the client left before its end.
        """
        self._admission.check()
        _check_encoding(exchange)
        announced = exchange.header(b"content-length")
        if announced is not None and announced.isdigit():
            self._check_size(int(announced))
        try:
            async with self._admission.arriving(self._timeout_s):
                pieces = await self._pieces(exchange)
        except TimeoutError:
            self._admission.check()
            raise BodyTimedOut(
                f"the request body did not arrive within {self._timeout_s:g} s, "
                f"only {exchange.num_body_bytes} bytes of it",
                hint="send it faster, or start the server with a larger --body-timeout-s",
                timeout_s=self._timeout_s,
            ) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def decode(self, exchange: Exchange, decode: Callable[[bytes], Decoded]) -> Decoded:
        """`decode` of the body; in a thread if it is large."""
        return await decode_apart(await self.read(exchange), decode)

    def release(self, exchange: Exchange) -> None:
        """The request has ended, and nothing holds its body any more."""
        self._num_held_bytes -= exchange.num_body_bytes

    async def _pieces(self, exchange: Exchange) -> list[bytes]:
        pieces: list[bytes] = []
        more = True
        while more:
            message = await exchange.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected("the client disconnected while sending its request")
            piece = message.get("body", b"")
            exchange.num_body_bytes += len(piece)
            self._num_held_bytes += len(piece)
            self._check_size(exchange.num_body_bytes)
            self._check_total()
            pieces.append(piece)
            more = message.get("more_body", False)
        return pieces

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._limit_bytes:
            raise TooLarge(
                f"the request body has {num_bytes} bytes or more, the limit is {self._limit_bytes}",
                hint="send less, or start the server with a larger --http-max-input-size",
                limit=self._limit_bytes,
            )

    def _check_total(self) -> None:
        if self._num_held_bytes > self._total_limit_bytes:
            raise QueueFull(
                f"the bodies of all requests together have {self._num_held_bytes} bytes, the limit "
                f"is {self._total_limit_bytes}",
                hint="retry after a pause, or raise --http-max-total-input-size",
                limit=self._total_limit_bytes,
                retry_after_s=1,
            )


async def decode_apart(data: bytes, decode: Callable[[bytes], Decoded]) -> Decoded:
    """`decode(data)`; in a thread if `data` is large, so that the event loop goes on."""
    if len(data) <= MAX_INLINE_BYTES:
        return decode(data)
    return await asyncio.to_thread(decode, data)


def _check_encoding(exchange: Exchange) -> None:
    encoding = exchange.header(b"content-encoding")
    if encoding not in (None, b"", b"identity"):
        raise Unsupported(
            f"content encoding '{(encoding or b'').decode('latin-1')}' is not supported",
            hint="send the body as it is",
        )
