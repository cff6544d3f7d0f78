"""Request bodies that are many, large, slow or of the wrong kind."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from naiad.backends.identity import IdentityModel
from naiad.backends.scripted import ScriptedLanguageModel
from naiad.core.generation import GenerateRequest
from naiad.server.openai import requests
from tests.server.asgi import Client, call, make_app
from tests.server.conftest import SCRIPT, Start

POSTS = [
    "/v1/chat/completions",
    "/openai/v1/completions",
    "/v2/models/scripted/generate",
    "/v2/models/scripted/infer",
]


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "scripted", "max_tokens": 1, **fields}).encode()


@pytest.mark.parametrize("prompts", [["a"] * 4, [[1]] * 4])
async def test_more_prompts_than_the_limit_are_refused_before_any_request_is_made(
    prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(**fields: Any) -> GenerateRequest:
        made.append(fields)
        return GenerateRequest(**fields)

    monkeypatch.setattr(requests, "GenerateRequest", make)
    app = make_app(ScriptedLanguageModel(SCRIPT), max_prompts=3)

    refused = await call(app, "POST", "/v1/completions", completion(prompt=prompts))
    assert (refused.status, made) == (400, [])
    error = json.loads(refused.text)["error"]
    assert error["param"] == "prompt"
    assert "4 prompts" in error["message"]
    assert "at most 3" in error["message"]
    assert (
        await call(app, "POST", "/v1/completions", completion(prompt=prompts[:3]))
    ).status == 200
    assert (await call(app, "POST", "/v1/completions", completion(prompt=[1] * 9))).status == 200


async def test_prompts_of_one_request_begin_one_by_one() -> None:
    """So that reading them all never keeps the event loop from anything else."""
    began: list[int] = []

    class Model(ScriptedLanguageModel):
        async def generate(self, request: GenerateRequest) -> Any:
            began.append(len(ticks))
            async for delta in super().generate(request):
                yield delta

    ticks: list[None] = []

    async def tick() -> None:
        while True:
            ticks.append(None)
            await asyncio.sleep(0)

    app = make_app(Model(SCRIPT))
    ticking = asyncio.create_task(tick())
    assert (await call(app, "POST", "/v1/completions", completion(prompt=["a"] * 9))).status == 200
    ticking.cancel()

    assert len(set(began)) == 9


async def test_a_large_body_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def note(*arguments: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return decode(*arguments)

    decode = requests.decode
    monkeypatch.setattr(requests, "decode", note)
    app = make_app(ScriptedLanguageModel(SCRIPT, max_model_len=10**6))
    for count in (1, 10_000):
        messages = [{"role": "user", "content": "a"}] * count
        body = completion(messages=messages)
        assert (await call(app, "POST", "/v1/chat/completions", body)).status == 200

    assert threads == [True, False]


class Stalling(Client):
    """Sends the beginning of a body and then nothing."""

    def __init__(self, path: str, beginning: bytes) -> None:
        super().__init__("POST", path, beginning)
        self.stalled = asyncio.Event()

    async def receive(self) -> Any:
        if self._body is None:
            self.stalled.set()
        message = await super().receive()
        return {**message, "more_body": True} if message["type"] == "http.request" else message


@pytest.mark.parametrize("path", POSTS)
async def test_a_body_that_stalls_is_given_up(path: str) -> None:
    app = make_app(ScriptedLanguageModel(SCRIPT), body_timeout_s=0.01)
    client = Stalling(path, b"{")

    await app(client.scope, client.receive, client.send)

    assert client.status == 408
    assert b"0.01 s" in client.text
    assert (b"connection", b"close") in client.sent[0]["headers"]


async def test_bodies_together_are_bounded_and_counted_until_their_request_ends() -> None:
    app = make_app(ScriptedLanguageModel(SCRIPT), http_max_total_input_size=200)
    body = completion(prompt="a")
    stalling = Stalling("/v1/completions", b"{" + b" " * 190)
    first = asyncio.create_task(app(stalling.scope, stalling.receive, stalling.send))
    await stalling.stalled.wait()

    refused = await call(app, "POST", "/v1/completions", body)
    stalling.leave()
    await first

    assert refused.status == 429
    assert b"--http-max-total-input-size" in refused.text
    for _ in range(9):
        assert (await call(app, "POST", "/v1/completions", body)).status == 200


async def test_a_body_that_stalls_does_not_delay_the_end_of_the_server(start: Start) -> None:
    async with start() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        while not running.server.admission.num_arriving:
            await running.http.get("/v2/health/live")
        running.server.shut_down()
        async with asyncio.timeout(1):
            await running.server.run()
        reply = await reader.read()
        writer.close()

    assert reply.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("path", POSTS)
async def test_a_compressed_body_is_refused_as_such(path: str) -> None:
    app = make_app(ScriptedLanguageModel(SCRIPT))
    client = Client("POST", path, b"\x1f\x8b")
    client.scope["headers"].append((b"content-encoding", b"gzip"))

    await app(client.scope, client.receive, client.send)

    assert client.status == (501 if path.startswith("/v2/") else 400)
    assert b"content encoding 'gzip' is not supported" in client.text


@pytest.mark.parametrize("path", POSTS)
async def test_a_wrong_method_is_405_and_says_which_is_right(path: str) -> None:
    client = await call(make_app(ScriptedLanguageModel(SCRIPT)), "GET", path)

    assert client.status == 405
    assert (b"allow", b"POST") in client.sent[0]["headers"]
    error = json.loads(client.text)["error"]
    text = error if path.startswith("/v2/") else error["message"]
    assert "Method Not Allowed" in text


async def test_pages_refuse_a_wrong_method_alike() -> None:
    app = make_app(ScriptedLanguageModel(SCRIPT), IdentityModel())
    for path in ("/v1/models", "/v2/models/identity", "/v2/models/identity/ready"):
        client = await call(app, "POST", path)
        assert client.status == 405
        assert b"GET" in dict(client.sent[0]["headers"])[b"allow"]
