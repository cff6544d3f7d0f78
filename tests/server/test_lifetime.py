"""Leaving clients, full queues, limits, slow readers and the server's own end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator

import pytest

from naiad.backends.scripted import ScriptedLanguageModel, wait_at
from naiad.core.errors import InvalidSettings
from naiad.core.generation import GenerateRequest
from naiad.server.http.protocol import MAX_HEAD_BYTES
from naiad.server.lifecycle import Server, serve
from naiad.server.settings import ServerSettings
from tests.server.asgi import Client, call, make_app
from tests.server.conftest import SCRIPT, Running, Start

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}
TEXT = "".join(SCRIPT)

ROUTES = [
    ("/v1/chat/completions", STREAM),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "scripted", "prompt": ["a", "b"], "stream": True}),
    ("/v2/models/scripted/generate_stream", {"text_input": "a", "stream": True}),
    ("/v2/models/scripted/generate", {"text_input": "a"}),
]


class Held:
    """A model that stops before its third token until told to go on."""

    def __init__(self, **options: int) -> None:
        self.go_on = asyncio.Event()
        self.model = ScriptedLanguageModel(SCRIPT, before_token=wait_at(2, self.go_on), **options)

    async def running(self, number: int = 1) -> None:
        await self.model.until(lambda: self.model.num_running == number)


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_client_that_leaves_cancels_its_request(
    start: Start, path: str, body: dict[str, object]
) -> None:
    held = Held()
    num_requests = len(body.get("prompt", "x"))  # type: ignore[arg-type]
    async with start(held.model) as running:
        request = asyncio.create_task(running.post(path, body))
        await held.running(num_requests)
        request.cancel()
        await held.model.until(lambda: held.model.num_cancelled == num_requests)
        await running.server.admission.idle()

        assert held.model.num_running == 0
        failed = running.server.table.find("scripted").statistics.num_failed
        assert failed["CANCELED"] == num_requests  # type: ignore[index]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_no_task_outlives_its_request(path: str, body: dict[str, object]) -> None:
    held = Held()
    app = make_app(held.model)
    before = asyncio.all_tasks()
    client = Client("POST", path, json.dumps(body).encode())
    request = asyncio.create_task(app(client.scope, client.receive, client.send))
    await held.running(len(body.get("prompt", "x")))  # type: ignore[arg-type]
    client.leave()
    await request

    assert held.model.num_running == 0
    held.go_on.set()
    await call(app, "POST", path, json.dumps(body).encode())
    await asyncio.sleep(0)  # let cancelled watchers end
    assert asyncio.all_tasks() == before


async def test_a_client_that_does_not_read_stops_the_model() -> None:
    position = 0

    async def note(_request: GenerateRequest, at: int) -> None:
        nonlocal position
        position = at

    app = make_app(ScriptedLanguageModel(SCRIPT, before_token=note))
    body = json.dumps({**STREAM, "ignore_eos": True, "max_tokens": 100}).encode()
    client = Client("POST", "/v1/chat/completions", body)
    request = asyncio.create_task(app(client.scope, client.receive, client.send))
    await client.has_sent(3)
    client.reads.clear()
    for _ in range(20):
        await asyncio.sleep(0)
    stopped_at = position
    for _ in range(50):
        await asyncio.sleep(0)

    assert position == stopped_at < 10
    client.leave()
    await request


async def test_a_full_queue_is_429_with_a_pause(start: Start) -> None:
    held = Held(max_running=1, max_waiting=0)
    async with start(held.model) as running:
        first = asyncio.create_task(running.post("/v1/chat/completions", CHAT))
        await held.running()
        chat = await running.post("/v1/chat/completions", STREAM)
        triton = await running.post("/v2/models/scripted/generate", {"text_input": "a"})
        held.go_on.set()

        assert (await first).status_code == 200
    assert chat.status_code == triton.status_code == 429
    assert chat.headers["retry-after"] == triton.headers["retry-after"] == "1"
    assert chat.json()["error"]["code"] == "rate_limit_exceeded"
    assert "bound is 0" in triton.json()["error"]


async def test_concurrent_requests_can_be_limited(start: Start) -> None:
    held = Held()
    async with start(held.model, max_concurrent_requests=1) as running:
        first = asyncio.create_task(running.post("/v1/chat/completions", CHAT))
        await held.running()
        second = await running.post("/v1/chat/completions", CHAT)
        held.go_on.set()
        await first

    assert second.status_code == 429
    assert "--max-concurrent-requests" in second.json()["error"]["message"]


async def test_a_body_over_the_limit_is_413_announced_or_not(start: Start) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    async with start(http_max_input_size=1000) as running:
        for path in ("/v1/completions", "/v2/models/scripted/infer"):
            announced = await running.http.post(path, content=b" " * 1001)
            grown = await running.http.post(path, content=pieces())
            assert announced.status_code == grown.status_code == 413
            for number in ("1001", "1000", "--http-max-input-size"):
                assert number in announced.text


async def test_a_sane_request_id_is_kept_and_any_other_replaced(start: Start) -> None:
    async with start() as running:
        for given, kept in (("abc-1", True), ("bad id", False), ("x" * 200, False)):
            reply = await running.http.get("/v2", headers={"x-request-id": given})
            assert (reply.headers["x-request-id"] == given) is kept
        reply = await running.post("/v1/chat/completions", CHAT)
        assert reply.json()["id"] == "chatcmpl-" + reply.headers["x-request-id"]


async def test_every_request_leaves_a_line_in_the_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "naiad.access"):
        async with start() as running:
            await running.post("/v1/chat/completions", STREAM, headers={"x-request-id": "r1"})
            await running.post("/v2/models/scripted/generate", {"text_input": "a b"})
            await running.http.get("/nothing")

    chat, generate, nothing = (json.loads(r.message) for r in caplog.records if "ms" in r.message)
    assert (chat["request_id"], chat["status"], chat["model"]) == ("r1", 200, "scripted")
    assert (chat["num_input_tokens"], chat["num_output_tokens"]) == (2, len(SCRIPT) + 1)
    assert chat["bytes_out"] > 500
    assert (generate["num_input_tokens"], generate["num_output_tokens"]) == (2, len(SCRIPT) + 1)
    assert (nothing["path"], nothing["status"]) == ("/nothing", 404)


async def test_draining_refuses_new_requests_and_finishes_running_ones(start: Start) -> None:
    held = Held()
    async with start(held.model) as running:
        first = asyncio.create_task(running.post("/v1/chat/completions", STREAM))
        await held.running()
        ended = asyncio.create_task(_drain(running))
        await asyncio.sleep(0)
        ready = await running.http.get("/v2/health/ready")
        live = await running.http.get("/v2/health/live")
        health = await running.http.get("/health")
        chat = await running.post("/v1/chat/completions", CHAT)
        infer = await running.post("/v2/models/scripted/infer", {})
        held.go_on.set()
        reply = await first
        await ended

    assert (ready.status_code, health.status_code, live.status_code) == (503, 503, 200)
    assert (chat.status_code, infer.status_code) == (503, 503)
    assert chat.headers["retry-after"] == infer.headers["retry-after"] == "1"
    assert reply.text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"stop"' in reply.text
    assert held.model.closed


async def test_after_the_drain_running_requests_end_with_an_error(start: Start) -> None:
    held = Held()
    async with start(held.model, drain_timeout_s=0) as running:
        stream = asyncio.create_task(running.post("/v1/chat/completions", STREAM))
        whole = asyncio.create_task(
            running.post("/v2/models/scripted/generate", {"text_input": "a"})
        )
        await held.running(2)
        await _drain(running)

    assert (await stream).status_code == 200
    assert '"message":"the server is shutting down' in (await stream).text
    assert (await whole).status_code == 503
    assert held.model.num_cancelled == 2


async def _drain(running: Running) -> None:
    running.server.shut_down()
    await running.server.run()


async def test_a_signal_drains_and_a_second_one_ends_at_once() -> None:
    held = Held()
    settings = ServerSettings(
        http_address="127.0.0.1", http_port=0, metrics_port=0, drain_timeout_s=3600
    )
    started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve([held.model], settings, started=started.set_result))
    client = Running(await started)
    stream = asyncio.create_task(client.post("/v1/chat/completions", STREAM))
    await held.running()
    signal.raise_signal(signal.SIGTERM)
    await client.server.draining.wait()
    signal.raise_signal(signal.SIGINT)
    await serving

    assert "shutting down" in (await stream).text
    assert held.model.closed
    await client.http.aclose()
    await client.openai.close()


async def test_a_taken_port_says_which_flag_moves_it(start: Start) -> None:
    async with start() as running:
        taken = ServerSettings(
            http_address="127.0.0.1", http_port=0, metrics_port=running.server.port
        )
        with pytest.raises(InvalidSettings) as caught:
            await Server([ScriptedLanguageModel(SCRIPT)], taken).start()

    assert f"127.0.0.1:{running.server.port}" in str(caught.value)
    assert "--metrics-port" in caught.value.hint


async def test_models_are_closed_when_a_port_is_taken(start: Start) -> None:
    model = ScriptedLanguageModel(SCRIPT)
    async with start() as running:
        taken = ServerSettings(http_address="127.0.0.1", http_port=running.server.port)
        with pytest.raises(InvalidSettings):
            await serve([model], taken)

    assert model.closed


async def test_two_hundred_streams_at_once_all_end_whole(start: Start) -> None:
    async with start() as running:
        replies = await asyncio.gather(
            *(running.post("/v1/chat/completions", STREAM) for _ in range(200))
        )
        health = await running.http.get("/v2/health/ready")

    assert health.status_code == 200
    assert all(reply.text.count("data: ") == len(SCRIPT) + 3 for reply in replies)


async def test_a_pipelined_request_does_not_hide_that_the_client_left(start: Start) -> None:
    held = Held()
    body = json.dumps(STREAM).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(
        body
    )
    async with start(held.model) as running:
        _, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        writer.write((head + body) * 2)
        await held.running()
        writer.close()
        await writer.wait_closed()
        await held.model.until(lambda: held.model.num_cancelled == 1)
        await running.server.admission.idle()


async def test_an_endless_head_is_cut_off(start: Start) -> None:
    async with start() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        writer.write(b"GET / HTTP/1.1\r\nx: ")
        writer.write(b"y" * (MAX_HEAD_BYTES + 1))
        reply = await reader.read()
        writer.close()

    assert reply.startswith(b"HTTP/1.1 431 ")
