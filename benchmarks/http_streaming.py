"""CPU time that the server spends on one streamed token, from delta to socket.

A model whose deltas are ready-made streams chat completions to a client in another process; the
server process's CPU time, less the same run of the model's iterator alone, is divided by the tokens.

    python benchmarks/http_streaming.py --streams 32 --tokens 2000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator

import uvloop

from naiad.backends.scripted import ScriptedLanguageModel
from naiad.core.generation import FinishReason, GenerateDelta, GenerateRequest, PromptSummary
from naiad.server.lifecycle import Server
from naiad.server.settings import ServerSettings


class ReadyModel(ScriptedLanguageModel):
    """Yields the same delta again and again; one step of the event loop per token."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        num_tokens = request.sampling.max_tokens or 1
        summary = PromptSummary(num_tokens=1, num_cached_tokens=0)
        yield GenerateDelta(text="Hello", token_ids=(1,), prompt=summary)
        delta = GenerateDelta(text=' wor"ld', token_ids=(2,))
        for _ in range(num_tokens - 2):
            await asyncio.sleep(0)
            yield delta
        yield GenerateDelta(text=".", token_ids=(3,), finish_reason=FinishReason.LENGTH)


async def one_stream(port: int, num_tokens: int) -> int:
    """Read one stream to its end; returns its chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    body = json.dumps(
        {
            "model": "ready",
            "stream": True,
            "max_tokens": num_tokens,
            "messages": [{"role": "user", "content": "hi"}],
        }
    ).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    num_chunks = 0
    while piece := await reader.read(1 << 18):
        num_chunks += piece.count(b"data: {")
    writer.close()
    return num_chunks


def client(port: int, num_streams: int, num_tokens: int, rounds: int) -> None:
    """The other process."""

    async def main() -> None:
        for _ in range(rounds):
            counts = await asyncio.gather(
                *(one_stream(port, num_tokens) for _ in range(num_streams))
            )
            assert set(counts) == {num_tokens + 1}, counts

    uvloop.run(main())


async def iterate_alone(model: ReadyModel, request: GenerateRequest, num_streams: int) -> float:
    """CPU seconds of the model's iterators with nobody to serve."""

    async def drain() -> None:
        async for _ in model.generate(request):
            pass

    before = time.process_time()
    await asyncio.gather(*(drain() for _ in range(num_streams)))
    return time.process_time() - before


async def measure(num_streams: int, num_tokens: int, rounds: int) -> list[float]:
    """Microseconds per token, one value per round."""
    from naiad.core.generation import SamplingParams, TextPrompt

    model = ReadyModel(["x"], name="ready")
    settings = ServerSettings(http_address="127.0.0.1", http_port=0, metrics_port=0)
    server = Server([model], settings)
    await server.start()
    request = GenerateRequest(
        id="", prompt=TextPrompt("x"), sampling=SamplingParams(max_tokens=num_tokens)
    )
    results = []
    for _ in range(rounds):
        alone_s = await iterate_alone(model, request, num_streams)
        process = multiprocessing.get_context("spawn").Process(
            target=client, args=(server.port, num_streams, num_tokens, 1)
        )
        process.start()
        before = time.process_time()
        await asyncio.get_running_loop().run_in_executor(None, process.join)
        used_s = time.process_time() - before
        assert process.exitcode == 0
        results.append((used_s - alone_s) / (num_streams * num_tokens) * 1e6)
    server.shut_down()
    await server.run()
    return results


def main() -> None:
    """Print median and spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results = uvloop.run(measure(arguments.streams, arguments.tokens, arguments.rounds))
    print(
        f"{arguments.streams} streams x {arguments.tokens} tokens: "
        f"{statistics.median(results):.2f} us/token "
        f"({min(results):.2f} to {max(results):.2f} in {len(results)} rounds)"
    )


if __name__ == "__main__":
    main()
