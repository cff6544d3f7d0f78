"""`naiad serve` as a process: it says where it listens, drains on SIGTERM, and leaves nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

pytest.importorskip("torch")

from naiad.cli.startup import startup_rows
from naiad.engine.messages import Ready
from tools.make_tiny_checkpoint import write_checkpoint

ANY_PORT = ["--http-address", "127.0.0.1", "--http-port", "0", "--metrics-port", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", readable=True)


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A started server; its stderr is in the file `log`."""
    command = [sys.executable, "-m", "naiad", "serve", str(checkpoint), *ANY_PORT]
    names = ["--served-model-name", "mine"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command + names, stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path
        )
        yield process
        process.kill()
        process.communicate()


def read_table(process: subprocess.Popen[str]) -> dict[str, list[str]]:
    """The start-up table, up to the line of the metrics port."""
    table: dict[str, list[str]] = {}
    assert process.stdout is not None
    for line in process.stdout:
        key, value = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        table.setdefault(key, []).append(value)
        if value.endswith("/metrics"):
            break
    return table


def test_it_serves_until_sigterm_and_leaves_no_process(
    server: subprocess.Popen[str], checkpoint: Path, tmp_path: Path
) -> None:
    table = read_table(server)
    assert table["model"] == ["mine"]
    assert table["also called"] == [f"tiny, {checkpoint}"]
    url, metrics_url = table["listening"]
    children = psutil.Process(server.pid).children(recursive=True)
    assert len(children) == 1, "the engine runs in a process of its own"

    for name in ("mine", "tiny", str(checkpoint)):
        body = {"model": name, "prompt": "Once", "max_tokens": 2, "temperature": 0}
        reply = httpx2.post(f"{url}/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 2
    assert (
        'nv_inference_request_success{model="mine",version="1"} 3' in httpx2.get(metrics_url).text
    )

    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() for child in children)
    log = (tmp_path / "log").read_text()
    assert log.count('"path":"/v1/completions","status":200') == 3
    assert "Traceback" not in log


def test_a_taken_port_is_an_error_that_names_the_flag(
    server: subprocess.Popen[str], checkpoint: Path
) -> None:
    port = read_table(server)["listening"][0].rpartition(":")[2]
    command = [sys.executable, "-m", "naiad", "serve", str(checkpoint), *ANY_PORT, "--port", port]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"naiad: cannot listen on 127.0.0.1:{port}" in ran.stderr
    assert "--http-port" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_table_says_what_the_engine_said() -> None:
    ready = Ready(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        device="cpu",
        num_parameters=1_235_814_400,
        vocab_size=512,
        max_model_len=8192,
        kv_capacity_tokens=65_536,
        max_num_seqs=64,
        memory=[("weights", 2_471_645_608), ("left", 512)],
    )
    assert startup_rows(["a", "b"], ready, ["http://localhost:8000"]) == [
        ("model", "a"),
        ("also called", "b"),
        ("architecture", "LlamaForCausalLM, 1.24 B parameters"),
        ("dtype", "bfloat16"),
        ("device", "cpu"),
        ("context", "8,192 tokens"),
        ("KV cache", "65,536 tokens, 64 sequences"),
        ("memory: weights", "2.3 GiB"),
        ("memory: left", "512 B"),
        ("listening", "http://localhost:8000"),
    ]
