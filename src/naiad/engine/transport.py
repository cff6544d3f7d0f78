"""Frames over a Unix socketpair: 4 bytes little-endian length, then one msgpack message.

The engine holds a `BlockingChannel`, its client an asyncio `FrameProtocol`; both say at once when
the other end is gone. What the messages mean is `naiad.engine.messages`' business, when to send them
the business of `naiad.engine.process` and of the client. This module starts no thread.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

from naiad.core.errors import NaiadError, TooLarge

HEADER_BYTES = 4
MAX_FRAME_BYTES = 256 * 2**20
"""No message is near it (a million prompt tokens are 5 MB); what claims more is a corrupt stream."""
MAX_UNSENT_BYTES = 32 * 2**20
"""What the engine buffers for a client that does not read, some thousand steps, before it waits."""
_RECEIVE_BYTES = 1 << 18

Message = TypeVar("Message")


class PeerGone(NaiadError):
    """The process at the other end of the socket has closed it or died."""


class MessageTooLarge(TooLarge):
    """A message would be larger than a frame may be; nothing of it was sent."""


class CorruptFrame(NaiadError):
    """A frame is larger than the bound; the stream cannot be trusted any more."""


class FrameEncoder:
    """Messages to frames."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._max_frame_bytes = max_frame_bytes

    def encode(self, message: msgspec.Struct) -> bytearray:
        """One frame. Raises `MessageTooLarge`."""
        frame = bytearray(HEADER_BYTES)
        self._encoder.encode_into(message, frame, HEADER_BYTES)
        size = len(frame) - HEADER_BYTES
        if size > self._max_frame_bytes:
            raise MessageTooLarge(
                f"message has {size} bytes, a frame takes {self._max_frame_bytes}",
                limit=self._max_frame_bytes,
            )
        frame[:HEADER_BYTES] = size.to_bytes(HEADER_BYTES, "little")
        return frame


class FrameDecoder(Generic[Message]):
    """Bytes, cut anywhere, to messages of type `kind` (a union of tagged structs)."""

    def __init__(self, kind: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decode: Callable[[memoryview], Message] = msgspec.msgpack.Decoder(kind).decode
        self._max_frame_bytes = max_frame_bytes
        self._partial = bytearray()
        self._needed_bytes = HEADER_BYTES

    def feed(self, data: bytes) -> list[Message]:
        """Every message that `data` completes, in order.

        Raises:
            CorruptFrame: a length above the bound, or bytes that are no such message.
        """
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed_bytes:
                return []
            data = bytes(self._partial)
            self._partial.clear()
        return self._take(memoryview(data))

    def _take(self, view: memoryview) -> list[Message]:
        messages: list[Message] = []
        start = 0
        self._needed_bytes = HEADER_BYTES
        while len(view) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            size = int.from_bytes(view[start:body], "little")
            if size > self._max_frame_bytes:
                raise CorruptFrame(f"frame of {size} bytes, the bound is {self._max_frame_bytes}")
            if body + size > len(view):
                self._needed_bytes = HEADER_BYTES + size
                break
            try:
                messages.append(self._decode(view[body : body + size]))
            except msgspec.MsgspecError as error:
                raise CorruptFrame(f"frame of {size} bytes is no message: {error}") from error
            start = body + size
        self._partial += view[start:]
        return messages


class BlockingChannel(Generic[Message]):
    """The engine's end: receives with or without waiting, sends without waiting for the reader.

    A message that the socket does not take at once is kept and goes out with the next call. A
    client that has not read `max_unsent_bytes` stops the engine (`send` waits for it) rather than
    growing its memory; it goes on when the client reads, and ends when the client dies.
    """

    def __init__(
        self,
        sock: socket.socket,
        kind: Any,
        *,
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._poll = select.poll()
        self._encoder = FrameEncoder(max_frame_bytes)
        self._decoder: FrameDecoder[Message] = FrameDecoder(kind, max_frame_bytes)
        self._unsent = bytearray()
        self._max_unsent_bytes = max_unsent_bytes

    def receive(self, *, wait: bool) -> list[Message]:
        """Messages that have arrived; with `wait`, at least one.

        Raises:
            PeerGone: the client is gone, and everything it sent has been returned.
        """
        messages = self._read()
        while wait and not messages:
            self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0))
            self._flush()
            messages = self._read()
        return messages

    def send(self, message: msgspec.Struct) -> None:
        """Send now or soon. Raises `PeerGone`, or `MessageTooLarge` and sends nothing."""
        self._unsent += self._encoder.encode(message)
        self._flush()
        while len(self._unsent) > self._max_unsent_bytes:
            self._wait(select.POLLOUT)
            self._flush()

    def flush(self) -> None:
        """Wait until everything is with the kernel. Raises `PeerGone`."""
        while self._unsent:
            self._wait(select.POLLOUT)
            self._flush()

    def close(self) -> None:
        """Close the socket; the client notices at once."""
        self._socket.close()

    def _read(self) -> list[Message]:
        messages: list[Message] = []
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError:
                data = b""
            if not data:
                if messages:
                    return messages  # the next call finds the end again
                raise PeerGone("the client closed the engine's socket")
            messages += self._decoder.feed(data)

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise PeerGone("the client closed the engine's socket") from error
            del self._unsent[:sent]

    def _wait(self, events: int) -> None:
        self._poll.register(self._socket, events)
        self._poll.poll()


class FrameProtocol(asyncio.Protocol, Generic[Message]):
    """The client's end, on any event loop.

    Args:
        kind: The union of messages that may arrive.
        on_message: Called with each, in order, on the event loop.
        on_lost: Called once when the engine is gone or talks nonsense (the exception says which).
    """

    def __init__(
        self,
        kind: Any,
        on_message: Callable[[Message], None],
        on_lost: Callable[[Exception | None], None],
    ) -> None:
        self._decoder: FrameDecoder[Message] = FrameDecoder(kind)
        self._encoder = FrameEncoder()
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._corrupt: CorruptFrame | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        try:
            messages = self._decoder.feed(data)
        except CorruptFrame as error:
            self._corrupt = error
            self.abort()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        self._on_lost(self._corrupt or exc)

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; one sent after the connection is lost is dropped.

        The queue has no bound of its own: whoever calls bounds the requests in flight.
        """
        if self._transport is not None:
            self._transport.write(self._encoder.encode(message))

    def abort(self) -> None:
        """Close without sending what is queued; `on_lost` is called soon."""
        if self._transport is not None:
            self._transport.abort()
