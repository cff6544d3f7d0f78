"""`naiad serve` as its users run it: a process, real sockets, and what its metrics say."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load_client import Request

ROOT = Path(__file__).resolve().parents[2]
ANY_PORT = ["--http-address", "127.0.0.1", "--http-port", "0", "--metrics-port", "0"]
ONE_THREAD = ["--num-threads", "1"]
"""A tiny model gains nothing from two, and loses much on a machine that is busy otherwise."""
LONG = {"max_tokens": 500, "ignore_eos": True}
"""Nearly all of a tiny checkpoint's context: seconds, not milliseconds."""


class Samples:
    """One scrape. The parser appends _total to Triton's counters, which have none; both names do."""

    def __init__(self, text: str) -> None:
        self._samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def __getitem__(self, name: str) -> float:
        return self.get(name)

    def get(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels; KeyError if there is none."""
        found = [
            value
            for known, known_labels, value in self._samples
            if known in (name, f"{name}_total") and labels.items() <= known_labels.items()
        ]
        if not found:
            raise KeyError(name)
        return sum(found)

    def names(self) -> set[str]:
        """Names of all samples."""
        return {name for name, _, _ in self._samples}


class ServerProcess:
    """A server that listens."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.table: dict[str, list[str]] = {}
        """The start-up table."""
        assert process.stdout is not None
        for line in process.stdout:
            key, value = re.split(r"\s{2,}", line.strip(), maxsplit=1)
            self.table.setdefault(key, []).append(value)
            if value.endswith("/metrics"):
                break
        else:
            raise RuntimeError(f"the server ended at its start:\n{log.read_text()}")
        self.url, self.metrics_url = self.table["listening"]
        self.port = int(self.url.rpartition(":")[2])
        self.name = self.table["model"][0]

    def engine(self) -> psutil.Process:
        """The one child."""
        (child,) = psutil.Process(self.process.pid).children(recursive=True)
        return child

    def metrics(self) -> Samples:
        """A scrape of the metrics port."""
        return Samples(httpx2.get(self.metrics_url, timeout=30).raise_for_status().text)

    def until(self, condition: Callable[[Samples], bool], timeout_s: float = 20) -> Samples:
        """Scrape until `condition` holds."""
        deadline_s = time.monotonic() + timeout_s
        while not condition(samples := self.metrics()):
            assert time.monotonic() < deadline_s, {
                name: samples[name]
                for name in sorted(samples.names())
                if re.match("vllm:(num|kv)", name)
            }
        return samples

    def complete(self, **body: Any) -> httpx2.Response:
        """`POST /v1/completions`."""
        body = {"model": self.name, "prompt": "Once upon a time", "temperature": 0} | body
        return httpx2.post(f"{self.url}/v1/completions", json=body, timeout=30)

    def streaming(
        self, prompt: str | Sequence[int], *, leave_after: int = 0, **body: Any
    ) -> Request:
        """A completion for the load client."""
        common = {"model": self.name, "temperature": 0, "stream": True}
        usage = {"stream_options": {"include_usage": True}}
        encoded = msgspec.json.encode(common | usage | {"prompt": prompt} | body)
        return Request("/v1/completions", msgspec.Raw(encoded), leave_after)


def is_idle(samples: Samples) -> bool:
    """Nothing runs, nothing waits, nothing holds keys and values."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    pending = samples["nv_inference_pending_request_count"]
    return pending == 0 and all(samples[f"vllm:{name}"] == 0 for name in names)


@contextlib.contextmanager
def serving(
    path: Path,
    folder: Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[ServerProcess]:
    """Start a server on free ports; its log goes to `folder`."""
    with starting(path, folder, *flags, environment=environment, prefix=prefix) as (process, log):
        yield ServerProcess(process, log)


@contextlib.contextmanager
def starting(
    path: Path,
    folder: Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """As `serving`, without waiting until it listens."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    command = [*prefix, sys.executable, "-m", "naiad", "serve", str(path), *flags]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder,
            env=os.environ | variables,
        )
    try:
        yield process, log
    finally:
        process.kill()
        process.communicate()
