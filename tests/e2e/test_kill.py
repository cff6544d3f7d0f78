"""Processes that are killed, servers that are told to stop, and clients that leave."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from benchmarks.load_client import Plan, Reply, finish, start
from tests.e2e.servers import (
    ANY_PORT,
    LONG,
    ONE_THREAD,
    Samples,
    ServerProcess,
    is_idle,
    serving,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

NUM_STREAMS = 32
NUM_ROWS = 24


def plan_streams(server: ServerProcess, number: int, *, leave_after: int = 0) -> Plan:
    prompts = [[0, 10 + at, 20 + at, 30 + at] for at in range(number)]
    streams = [server.streaming(prompt, leave_after=leave_after, **LONG) for prompt in prompts]
    return Plan("127.0.0.1", server.port, streams, timeout_s=60)


def all_run(samples: Samples) -> bool:
    """As many as fit run, the others wait."""
    running = samples["vllm:num_requests_running"]
    waiting = samples["vllm:num_requests_waiting"]
    return running == NUM_ROWS and running + waiting == NUM_STREAMS


def wait_gone(process: psutil.Process, timeout_s: float) -> float:
    """Seconds until the process has ended; a zombie that nobody has reaped yet counts."""
    begun_s = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < begun_s + timeout_s, f"process {process.pid} is still there"
        os.sched_yield()
    return time.monotonic() - begun_s


async def test_a_killed_engine_fails_its_requests_in_a_second_and_serves_in_five(
    checkpoint: Path, tmp_path: Path
) -> None:
    rows = ["--max-num-seqs", str(NUM_ROWS)]
    with serving(checkpoint, tmp_path, *ANY_PORT, *ONE_THREAD, *rows) as server:
        client = start(plan_streams(server, NUM_STREAMS))
        server.until(all_run)
        killed = server.engine()

        killed_s = time.monotonic()
        killed.kill()
        async with httpx2.AsyncClient(base_url=server.url, timeout=30) as http:
            while (await http.get("/v2/health/ready")).status_code == 200:
                assert time.monotonic() < killed_s + 1, "health has not noticed within a second"
            unready_s = time.monotonic() - killed_s
            body = {"model": server.name, "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
            request = asyncio.create_task(http.post("/v1/completions", json=body))
            in_between = []
            while not request.done():
                statuses = [
                    (await http.get(path)).status_code
                    for path in ("/v2/health/ready", f"/v2/models/{server.name}/ready", "/health")
                ]
                live = (await http.get("/v2/health/live")).status_code
                in_between.append((tuple(statuses), live))
            served_s = time.monotonic() - killed_s
            reply = await request
            ready = await http.get("/v2/health/ready")
        outcome = await asyncio.to_thread(finish, client)
        failed_s = max(reply.end_s for reply in outcome.replies) + outcome.begun_s - killed_s
        samples = server.until(is_idle)
        assert server.engine().pid != killed.pid
        log = server.log.read_text()

    print(
        f"\nengine killed under {NUM_STREAMS} streams: not ready after {unready_s * 1e3:.0f} ms, "
        f"last request failed after {failed_s * 1e3:.0f} ms, "
        f"next request served after {served_s:.2f} s"
    )
    assert failed_s < 1.0
    assert served_s < 5.0
    assert in_between[0] == ((400, 400, 503), 200)  # as Triton answers, and for Kubernetes
    assert ready.status_code == 200
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 4
    for failed in outcome.replies:
        check_failed(failed)
    begun = sum(failed.status == 200 for failed in outcome.replies)
    assert 0 < begun <= NUM_ROWS
    assert samples.get("vllm:request_success_total", finished_reason="error") == NUM_STREAMS
    assert samples["naiad:engine_restarts_total"] == 1
    assert f"engine process {killed.pid} died" in log
    assert "Traceback" not in log


def check_failed(reply: Reply) -> None:
    """An error as the last event of a stream that had begun, a 503 otherwise."""
    assert "died" in reply.error, reply
    assert reply.finish_reason is None
    if reply.status == 200:
        assert reply.done, "the [DONE] that clients wait for is missing"
        assert '"type":"server_error"' in reply.error
    else:
        assert reply.status == 503
        assert (reply.retry_after_s or 0) >= 1


def test_a_killed_server_leaves_no_process(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, *ANY_PORT, *ONE_THREAD) as server:
        client = start(plan_streams(server, NUM_STREAMS))
        server.until(lambda samples: samples["vllm:num_requests_running"] == NUM_STREAMS)
        engine = server.engine()

        server.process.kill()
        server.process.wait(5)
        gone_s = wait_gone(engine, timeout_s=2)
        outcome = finish(client)

    print(f"\nserver killed under {NUM_STREAMS} streams: engine gone after {gone_s * 1e3:.0f} ms")
    assert not any(reply.done for reply in outcome.replies)


async def test_a_terminated_server_finishes_what_runs_and_refuses_the_rest(
    checkpoint: Path, tmp_path: Path
) -> None:
    with serving(checkpoint, tmp_path, *ANY_PORT, *ONE_THREAD) as server:
        client = start(plan_streams(server, NUM_STREAMS))
        server.until(lambda samples: samples["vllm:num_requests_running"] == NUM_STREAMS)
        engine = server.engine()
        server.process.send_signal(signal.SIGTERM)
        async with httpx2.AsyncClient(base_url=server.url, timeout=30) as http:
            deadline_s = time.monotonic() + 5
            while (await http.get("/v2/health/ready")).status_code != 503:
                assert time.monotonic() < deadline_s
            body = {"model": server.name, "prompt": "Once", "max_tokens": 4}
            refused = await http.post("/v1/completions", json=body)
            infer = await http.post(f"/v2/models/{server.name}/generate", json={"text_input": "a"})
        outcome = await asyncio.to_thread(finish, client)
        code = await asyncio.to_thread(server.process.wait, 10)
        wait_gone(engine, timeout_s=2)
        log = server.log.read_text()

    assert code == 0
    assert (refused.status_code, infer.status_code) == (503, 503)
    assert refused.headers["retry-after"] == infer.headers["retry-after"] == "1"
    assert "shutting down" in refused.json()["error"]["message"]
    for reply in outcome.replies:
        assert reply.status == 200
        assert reply.done
        assert not reply.error
        assert (reply.num_tokens, reply.finish_reason) == (LONG["max_tokens"], "length")
    assert "Traceback" not in log


def test_a_client_that_leaves_stops_its_sequence(server: ServerProcess) -> None:
    before = server.until(is_idle)
    client = start(plan_streams(server, NUM_STREAMS, leave_after=5))
    outcome = finish(client)
    left_s = outcome.begun_s + max(reply.end_s for reply in outcome.replies)
    after = server.until(is_idle, timeout_s=5)
    idle_s = time.monotonic() - left_s

    num_steps, num_tokens = (
        int(after[name] - before[name])
        for name in ("vllm:iteration_tokens_total_count", "vllm:generation_tokens_total")
    )
    print(
        f"\n{NUM_STREAMS} clients left on their 5th event: {num_tokens} tokens generated in "
        f"{num_steps} steps, nothing held {idle_s * 1e3:.0f} ms after the last had left"
    )
    assert all(reply.left for reply in outcome.replies)
    assert num_tokens < NUM_STREAMS * 50, "they went on long after"
    aborted = {"finished_reason": "abort"}
    assert (
        after.get("vllm:request_success_total", **aborted)
        - before.get("vllm:request_success_total", **aborted)
        == NUM_STREAMS
    )
