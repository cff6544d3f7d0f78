"""Everything the README tells one to type works, and prints what the README says it prints."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The contents of every fenced block in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def workshop(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """An empty folder and an environment with the README's commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in (("python", ""), ("naiad", "-m naiad ")):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        command.chmod(0o755)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VIRTUAL_ENV": "",
    }
    return tmp_path, environment


def script_of(text: str, port: int) -> str:
    """The typed lines; after a server that was sent to the background, wait until it is ready."""
    url = f"localhost:{port}/v2/health/ready"
    ready = f"until curl -sfo /dev/null {url}; do sleep 0.1; kill -0 %1; done"
    lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    waiting = [f"{line}\n{ready}" if line.endswith("&") else f"{line}\necho" for line in lines]
    return "set -e\ntrap 'kill %1; wait' EXIT\n" + "\n".join(waiting)


def unlike(shown: list[str], printed: list[str]) -> list[str]:
    """Lines as shown that were not printed so, where … stands for anything; and what came instead."""
    pairs = itertools.zip_longest(shown, printed, fillvalue="(no line)")
    return [
        f"shown: {want}\nprinted: {got}"
        for want, got in pairs
        if not re.fullmatch(re.escape(want).replace("…", ".*"), got)
    ]


@pytest.mark.timeout(120)
@pytest.mark.skipif(not shutil.which("curl"), reason="needs the Debian package curl")
def test_the_commands_print_what_the_readme_shows(
    workshop: tuple[Path, dict[str, str]],
) -> None:
    folder, environment = workshop
    port = free_port()
    text = "".join(blocks("console")).replace(":8000", f":{port}").replace(":8002", ":…")
    ran = subprocess.run(
        ["bash", "-c", script_of(text, port)],
        cwd=folder,
        env=environment | {"NAIAD_SERVER__HTTP_PORT": str(port), "NAIAD_SERVER__METRICS_PORT": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    shown = [line for line in text.splitlines() if not line.startswith("$ ")]
    printed = [line.rstrip() for line in ran.stdout.splitlines() if line.strip()]
    assert unlike(shown, printed) == [], ran.stderr


@pytest.mark.timeout(120)
def test_the_python_runs(workshop: tuple[Path, dict[str, str]]) -> None:
    folder, environment = workshop
    for code in blocks("python"):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip()
