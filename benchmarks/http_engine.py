"""Throughput over HTTP beside the same engine offline: what serving costs, client included.

    python benchmarks/http_engine.py --processes 2 --rounds 4 --output benchmarks/results/...json

Both sides get the same 32 requests at once: 128 random token ids in, 128 tokens out, greedy, end of
sequence ignored, bf16, prefix cache off, all cores.

- offline: `naiad.LLM(path).generate(prompts)` in a process of its own; output tokens / wall time
- http: `naiad serve` and `benchmarks/load_client.py`, each a process; 32 streams of /v1/completions with
  usage; output tokens / wall time from the first byte sent to the end of the last stream

The two take turns in each round, in an order that alternates; each pair of processes serves some rounds.
A ratio compares the two turns of one round, so that what else the machine does hits both. It has
two memory-bandwidth states: read bandwidth is sampled before each round and reported. CPU seconds of
server, engine and client say where a loss goes, and those of everything else on the machine
(`others_cpu_s`, stolen time included) which rounds to leave out: two threads that meet at a barrier
several hundred times a step stand still when a third takes a core. With `--calm` a round waits for an
idle machine, and the summary counts only rounds in which others took less than that share of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load_client
import msgspec
import psutil
from cpu_engine import SHAPES, machine, read_bandwidth_gb_s

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = 10
"""Prompts avoid the ids below."""


def write_model(path: Path, shape: str) -> int:
    """A checkpoint whose tokenizer has a word for every id, so that each token is text to stream."""
    maker = str(ROOT / "tools" / "make_tiny_checkpoint.py")
    subprocess.run([sys.executable, maker, str(path), *SHAPES[shape]], check=True)
    vocab_size = int(json.loads((path / "config.json").read_text())["vocab_size"])
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    known = set(vocab.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocab |= {f"Ġword{number}": number for number in range(vocab_size) if number not in known}
    file.write_text(json.dumps(tokenizer))
    return vocab_size


def offline_worker(path: str, num_tokens: int) -> None:
    """Answer each line of standard input, prompts as JSON, with seconds and tokens."""
    from naiad import LLM, SamplingParams

    llm = LLM(path, prefix_cache=False)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    print("READY", flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        result = {
            "seconds": time.perf_counter() - start_s,
            "cpu_s": {"offline": time.process_time() - start_cpu_s},
            "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        }
        print("RESULT " + json.dumps(result), flush=True)


class Offline:
    """The offline process."""

    def __init__(self, path: Path, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        command = [sys.executable, __file__, "--offline-worker", str(path)]
        self.process = subprocess.Popen(
            [*command, "--tokens", str(num_tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read("READY")

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._read("RESULT "))
        return found

    def _read(self, prefix: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(prefix):
                return line.removeprefix(prefix)
        raise RuntimeError("the offline process ended")


class Http:
    """The server's processes; each turn starts a client."""

    def __init__(self, path: Path, num_tokens: int, log: Path) -> None:
        ports = "--http-address 127.0.0.1 --http-port 0 --metrics-port 0 --no-prefix-cache".split()
        command = [sys.executable, "-m", "naiad", "serve", str(path), *ports]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )
        self.num_tokens = num_tokens
        self._model = path.name
        assert self.process.stdout is not None
        self._port = 0
        for line in self.process.stdout:
            if found := re.match(r"listening +http://127\.0\.0\.1:(\d+)$", line.strip()):
                self._port = int(found[1])
            elif "/metrics" in line:
                break
        if not self._port:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        self._parts = {"server": psutil.Process(self.process.pid)}
        (self._parts["engine"],) = self._parts["server"].children()

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """One turn."""
        body = {
            "model": self._model,
            "max_tokens": self.num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        requests = [
            load_client.Request(
                "/v1/completions", msgspec.Raw(msgspec.json.encode({**body, "prompt": prompt}))
            )
            for prompt in prompts
        ]
        before = self._cpu_s()
        plan = load_client.Plan("127.0.0.1", self._port, requests)
        outcome = load_client.finish(load_client.start(plan))
        after = self._cpu_s()
        for reply in outcome.replies:
            assert reply.status == 200, reply
            assert reply.done, reply
            assert not reply.error, reply
        used = {name: after[name] - before[name] for name in before}
        return {
            "seconds": outcome.wall_s,
            "cpu_s": {**used, "client": outcome.cpu_s},
            "tokens": sum(reply.num_tokens or 0 for reply in outcome.replies),
            "events": sum(reply.num_events for reply in outcome.replies),
            "first_event_s": statistics.median(r.first_byte_s for r in outcome.replies),
        }

    def _cpu_s(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._parts.items()}
        return {name: time.user + time.system for name, time in times.items()}


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the process with the block."""
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def run_rounds(path: Path, vocab_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds of one pair of processes."""
    rng = random.Random(0)
    results = []
    offline = Offline(path, options.tokens)
    with ending(offline.process):
        http = Http(path, options.tokens, path.parent / "server.log")
        with ending(http.process):
            sides: dict[str, Offline | Http] = {"offline": offline, "http": http}
            for number in range(-1, options.rounds):  # the first warms up
                prompts = [
                    [rng.randrange(SPECIAL_TOKENS, vocab_size) for _ in range(options.prompt)]
                    for _ in range(options.streams)
                ]
                names = sorted(sides, reverse=number % 2 == 0)
                if options.calm:
                    wait_for_calm(options.calm, options.calm_timeout)
                result: dict[str, Any] = {"first": names[0], "read_gb_s": read_bandwidth_gb_s()}
                for name in names:
                    result[name] = measured(sides[name], prompts)
                result["ratio"] = result["http"]["tok_s"] / result["offline"]["tok_s"]
                if number >= 0:
                    results.append(result)
                    print(json.dumps(result), flush=True)
    return results


def busy_s() -> float:
    """CPU seconds that all cores together have not been idle, or were taken from the machine."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def measured(side: Offline | Http, prompts: list[list[int]]) -> dict[str, Any]:
    """One turn, its rate, and what the rest of the machine did meanwhile."""
    before_s = busy_s()
    result = side.run(prompts)
    assert result["tokens"] == len(prompts) * side.num_tokens, result
    result["tok_s"] = result["tokens"] / result["seconds"]
    result["others_cpu_s"] = busy_s() - before_s - sum(result["cpu_s"].values())
    return result


def wait_for_calm(share: float, timeout_s: float) -> None:
    """Return when everybody else has used less than `share` of the machine for two seconds."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and psutil.cpu_percent(2.0) > share * 100:
        pass


def is_calm(result: dict[str, Any], share: float) -> bool:
    """Whether others took less than `share` of the machine in both turns of a round."""
    cores = os.cpu_count() or 1
    turns = (result["offline"], result["http"])
    return all(turn["others_cpu_s"] < share * cores * turn["seconds"] for turn in turns)


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates, their ratio, and CPU seconds by process, over all rounds."""
    summary: dict[str, Any] = {
        f"{name}_tok_s": spread([result[name]["tok_s"] for result in results])
        for name in ("offline", "http")
    }
    summary["http_over_offline"] = spread([result["ratio"] for result in results])
    summary["http_over_offline"]["of_medians"] = (
        summary["http_tok_s"]["median"] / summary["offline_tok_s"]["median"]
    )
    summary["cpu_s"] = {
        part: spread([result[name]["cpu_s"][part] for result in results])
        for name in ("offline", "http")
        for part in results[0][name]["cpu_s"]
    }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--processes", type=int, default=2, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each pair")
    parser.add_argument(
        "--calm", type=float, default=0.0, help="others' share of the machine, at most"
    )
    parser.add_argument("--calm-timeout", type=float, default=120.0, help="seconds to wait for it")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--offline-worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.offline_worker:
        offline_worker(options.offline_worker, options.tokens)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / options.shape
        vocab_size = write_model(path, options.shape)
        for _ in range(options.processes):
            results += run_rounds(path, vocab_size, options)
    counted = [result for result in results if not options.calm or is_calm(result, options.calm)]
    if not counted:
        raise SystemExit(f"others took more than {options.calm:.0%} of the machine in every round")
    packages = ("torch", "uvicorn", "uvloop", "tokenizers")
    summary = {
        "options": {
            name: value
            for name, value in vars(options).items()
            if name not in ("output", "offline_worker")
        },
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg(),
        "num_rounds": len(results),
        "num_rounds_counted": len(counted),
        **summarise(counted),
        "rounds": results,
    }
    print(json.dumps({key: summary[key] for key in summary if key != "rounds"}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
