"""A tiny checkpoint and a server on it, for every test that needs no server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.e2e.servers import ANY_PORT, ONE_THREAD, ServerProcess, serving
from tools.make_tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("e2e") / "tiny", readable=True)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with serving(checkpoint, folder, *ANY_PORT, *ONE_THREAD) as running:
        yield running
