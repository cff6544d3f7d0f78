"""A lean HTTP client that holds many event streams at once, in a process of its own.

It reads a `Plan` as JSON on standard input and writes an `Outcome` on standard output. While streams
run it only keeps bytes; they are read once everything has ended, so that the client takes as little as
possible of the machine that it shares with the server it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

_EVENT = b"data: {"
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)


class Request(msgspec.Struct):
    """One POST."""

    path: str
    body: msgspec.Raw
    leave_after_events: int = 0
    """Close the connection on this event of the stream; 0: read it to its end."""


class Plan(msgspec.Struct):
    """What to send, all of it at once."""

    host: str
    port: int
    requests: list[Request]
    polls: list[str] = []
    """Paths to GET in turn, each on a connection of its own, as long as requests run."""
    poll_interval_s: float = 0.01
    timeout_s: float = 300.0


class Reply(msgspec.Struct):
    """What came of one request; times count from the first connection attempt of the run."""

    status: int = 0
    """0: the connection ended before a status."""
    num_events: int = 0
    num_tokens: int | None = None
    """What the stream's usage said."""
    text: str = ""
    finish_reason: str | None = None
    done: bool = False
    """Whether [DONE] came."""
    left: bool = False
    """Whether this client closed the connection, as planned."""
    retry_after_s: int | None = None
    error: str = ""
    """The body of a refusal, the error event of a stream, or why the connection broke."""
    sent_s: float = 0.0
    first_byte_s: float = 0.0
    end_s: float = 0.0


class Poll(msgspec.Struct):
    """One GET; status 0: no answer."""

    path: str
    status: int
    begun_s: float
    seconds: float


class Outcome(msgspec.Struct):
    """A finished plan."""

    begun_s: float
    """On the host's monotonic clock."""
    replies: list[Reply]
    polls: list[Poll]
    wall_s: float
    """From the first request's first byte sent to the last stream's end."""
    cpu_s: float
    """Processor time of this process meanwhile."""


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, leave_after_events: int) -> None:
        self._request = request
        self._leave_after = leave_after_events
        self._num_events = 0
        self._transport: asyncio.Transport | None = None
        self.pieces: list[bytes] = []
        self.sent_s = self.first_byte_s = self.end_s = 0.0
        self.left = False
        self.broken = ""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.sent_s = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.pieces:
            self.first_byte_s = time.monotonic()
        self.pieces.append(data)
        if self._leave_after:
            self._num_events += data.count(_EVENT)
            if self._num_events >= self._leave_after and not self.left:
                self.left = True
                self._transport.abort()  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        self.end_s = time.monotonic()
        if exc is not None and not self.left:
            self.broken = f"{type(exc).__name__}: {exc}"
        if not self.ended.done():
            self.ended.set_result(None)


async def run(plan: Plan) -> Outcome:
    """Send everything at once, wait for every end, then read what came."""
    loop = asyncio.get_running_loop()
    requests = [_http(plan.host, "POST", request.path, request.body) for request in plan.requests]
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    polls: list[Poll] = []
    poller = asyncio.create_task(_poll(plan, begun_s, polls)) if plan.polls else None

    async def send(number: int) -> _Connection:
        connection = _Connection(requests[number], plan.requests[number].leave_after_events)
        try:
            await loop.create_connection(lambda: connection, plan.host, plan.port)
            await connection.ended
        except OSError as error:
            connection.broken = f"{type(error).__name__}: {error}"
            connection.end_s = time.monotonic()
        return connection

    async with asyncio.timeout(plan.timeout_s):
        connections = await asyncio.gather(*(send(number) for number in range(len(requests))))
    cpu_s = time.process_time() - begun_cpu_s
    first_s = min(connection.sent_s for connection in connections)
    last_s = max(connection.end_s for connection in connections)
    if poller is not None:
        poller.cancel()
        await poller  # the polls on their way are answered
    replies = [_read(connection, begun_s) for connection in connections]
    return Outcome(begun_s, replies, polls, wall_s=last_s - first_s, cpu_s=cpu_s)


async def _poll(plan: Plan, begun_s: float, polls: list[Poll]) -> None:
    """A GET each interval, whether or not earlier ones have been answered; until cancelled."""
    paths = itertools.cycle(plan.polls)
    due_s = time.monotonic()
    async with asyncio.TaskGroup() as running:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                running.create_task(_get(plan, next(paths), begun_s, polls))
                due_s += plan.poll_interval_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))


async def _get(plan: Plan, path: str, begun_s: float, polls: list[Poll]) -> None:
    connection = _Connection(_http(plan.host, "GET", path, b""), 0)
    start_s = time.monotonic()
    try:
        await asyncio.get_running_loop().create_connection(lambda: connection, plan.host, plan.port)
        await connection.ended
    except OSError:
        connection.end_s = time.monotonic()
    status = _STATUS.match(b"".join(connection.pieces))
    number = int(status[1]) if status else 0
    polls.append(Poll(path, number, start_s - begun_s, connection.end_s - start_s))


def _http(host: str, method: str, path: str, body: bytes | msgspec.Raw) -> bytes:
    data = bytes(body)
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
    return (head + f"content-length: {len(data)}\r\n\r\n").encode() + data


def _read(connection: _Connection, begun_s: float) -> Reply:
    """The stream's chunks of HTTP joined, its events read."""
    reply = Reply(
        left=connection.left,
        error=connection.broken,
        sent_s=connection.sent_s - begun_s,
        first_byte_s=connection.first_byte_s - begun_s,
        end_s=connection.end_s - begun_s,
    )
    head, _, body = b"".join(connection.pieces).partition(b"\r\n\r\n")
    status = _STATUS.match(head)
    if status is None:
        return reply
    reply.status = int(status[1])
    retry_after = _RETRY_AFTER.search(head)
    reply.retry_after_s = int(retry_after[1]) if retry_after else None
    if b"chunked" in head.lower():
        body = _dechunk(body)
    if reply.status != 200:
        reply.error = body.decode(errors="replace")
        return reply
    texts: list[str] = []
    for event in body.split(b"\n\n")[:-1]:
        _read_event(event.removeprefix(b"data: "), reply, texts)
    reply.text = "".join(texts)
    return reply


def _read_event(data: bytes, reply: Reply, texts: list[str]) -> None:
    if data == b"[DONE]":
        reply.done = True
        return
    reply.num_events += 1
    event = msgspec.json.decode(data)
    if "error" in event:
        reply.error = data.decode()
        return
    if event.get("usage"):
        reply.num_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        texts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
        reply.finish_reason = choice["finish_reason"] or reply.finish_reason


def _dechunk(data: bytes) -> bytes:
    pieces = []
    at = 0
    while (line_end := data.find(b"\r\n", at)) > 0:
        size = int(data[at:line_end], 16)
        pieces.append(data[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2
    return b"".join(pieces)


def raise_file_limit() -> None:
    """As many open connections as the kernel lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start(plan: Plan) -> subprocess.Popen[bytes]:
    """Begin `plan` in a process of its own; `finish` waits for it."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(plan))
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[bytes]) -> Outcome:
    """Wait for a started plan; raises if the client failed."""
    output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the load client exited with {process.returncode}")
    return msgspec.json.decode(output, type=Outcome)


if __name__ == "__main__":
    raise_file_limit()
    outcome = uvloop.run(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))
