"""A thousand streaming clients at once, half of whom leave midway."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks.load_client import Outcome, Plan, Reply, finish, start
from tests.e2e.servers import ANY_PORT, ONE_THREAD, ServerProcess, is_idle, serving

pytestmark = pytest.mark.timeout(240)

NUM_CLIENTS = 1000
NUM_TOKENS = 96
NUM_ROWS = 64
"""Sequences in one step, the default on CPU."""
QUEUE_BOUND = 64
MIB = 2**20
FEW_FILES = ["sh", "-c", 'ulimit -Sn 256 && exec "$@"', "sh"]
"""Fewer than there are clients; what is usual, 1,024, would nearly do."""


def plan_load(server: ServerProcess) -> Plan:
    """Every second client leaves, on its first to sixteenth event."""
    rng = random.Random(7)
    requests = [
        server.streaming(
            [0, *(rng.randrange(5, 380) for _ in range(rng.randrange(4, 12)))],
            leave_after=rng.randint(1, 16) if number % 2 else 0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
        )
        for number in range(NUM_CLIENTS)
    ]
    health = ["/v2/health/ready", "/health"]
    return Plan("127.0.0.1", server.port, requests, polls=health, timeout_s=200)


def peak_open(replies: list[Reply]) -> int:
    """Most streams that were open at one time."""
    changes = [(reply.sent_s, 1) for reply in replies] + [(reply.end_s, -1) for reply in replies]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def check_served(reply: Reply, *, leaves: bool) -> None:
    """It left as it meant to, or has everything; events that come together may be too few to leave."""
    assert reply.status == 200, reply
    if reply.left:
        assert leaves
        return
    assert not reply.error, reply
    assert reply.done, reply
    assert reply.num_tokens == NUM_TOKENS
    assert reply.finish_reason == "length"
    assert reply.text


def check_health(outcome: Outcome) -> float:
    """Returns the 99th percentile of the polls' times."""
    assert {poll.status for poll in outcome.polls} == {200}
    assert len(outcome.polls) >= 20
    return sorted(poll.seconds for poll in outcome.polls)[len(outcome.polls) * 99 // 100]


def peak_rss_mib(pid: int) -> float:
    """The most memory that the process ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) / 1024


def run_load(server: ServerProcess) -> tuple[Outcome, dict[str, float]]:
    """The clients, to the last; and by how many MiB the memory of each process grew at most."""
    server.complete(max_tokens=4)  # what is loaded with the first request is no growth
    pids = {"server": server.process.pid, "engine": server.engine().pid}
    before = {name: psutil.Process(pid).memory_info().rss / MIB for name, pid in pids.items()}
    outcome = finish(start(plan_load(server)))
    server.until(is_idle)
    return outcome, {name: peak_rss_mib(pid) - before[name] for name, pid in pids.items()}


def tell(outcome: Outcome, health_s: float, grown_mib: dict[str, float]) -> None:
    statuses = dict(Counter(reply.status for reply in outcome.replies))
    grown = ", ".join(f"{name} +{size:.0f} MiB" for name, size in grown_mib.items())
    print(
        f"\n{NUM_CLIENTS} clients: statuses {statuses}, "
        f"{sum(reply.left for reply in outcome.replies)} left, {peak_open(outcome.replies)} open "
        f"at once, {outcome.wall_s:.1f} s; health p99 {health_s * 1e3:.0f} ms of "
        f"{len(outcome.polls)} polls; peak memory {grown}"
    )


def check_log(server: ServerProcess) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log
    assert '"level":"error"' not in log


def test_with_the_default_bounds_everyone_who_stays_gets_every_token(
    checkpoint: Path, tmp_path: Path
) -> None:
    with serving(checkpoint, tmp_path, *ANY_PORT, *ONE_THREAD, prefix=FEW_FILES) as server:
        outcome, grown_mib = run_load(server)
        health_s = check_health(outcome)
        tell(outcome, health_s, grown_mib)
        after = server.metrics()
        check_log(server)

    for number, reply in enumerate(outcome.replies):
        check_served(reply, leaves=number % 2 == 1)
    assert peak_open(outcome.replies) > NUM_CLIENTS * 0.9
    assert health_s < 1.0
    assert grown_mib["server"] < 200
    assert sum(reply.left for reply in outcome.replies) > NUM_CLIENTS * 0.4
    # A client may leave so late that its answer is complete already, never the other way round.
    stayed = after.get("vllm:request_success_total", finished_reason="length")
    aborted = after.get("vllm:request_success_total", finished_reason="abort")
    assert stayed >= NUM_CLIENTS / 2
    assert stayed + aborted == NUM_CLIENTS + 1
    assert aborted > NUM_CLIENTS * 0.3


def test_with_a_short_queue_only_the_surplus_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    bound = ["--max-queued-requests", str(QUEUE_BOUND)]
    with serving(checkpoint, tmp_path, *ANY_PORT, *ONE_THREAD, *bound, prefix=FEW_FILES) as server:
        outcome, grown_mib = run_load(server)
        health_s = check_health(outcome)
        tell(outcome, health_s, grown_mib)
        again = server.complete(max_tokens=4)
        check_log(server)

    refused = [reply for reply in outcome.replies if reply.status == 429]
    for number, reply in enumerate(outcome.replies):
        if reply.status == 429:
            assert (reply.retry_after_s or 0) >= 1
            assert "rate_limit" in reply.error
        else:
            check_served(reply, leaves=number % 2 == 1)
    assert 0 < len(refused) <= NUM_CLIENTS - NUM_ROWS - QUEUE_BOUND
    assert again.status_code == 200
    assert health_s < 1.0
    assert grown_mib["server"] < 200
