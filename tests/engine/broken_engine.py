"""The real engine on a device that fails every step. Run as a script it is an engine process.

Its checkpoint is the model's folder, or a tiny one if that has none. In a folder with a file named
`mended` the device works.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from naiad.engine import process
from naiad.engine.config import EngineConfig
from naiad.engine.engine import Engine
from tests.engine.driving import checkpoint

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); import runpy; "
_SCRIPT += "runpy.run_module('tests.engine.broken_engine', run_name='__main__', alter_sys=True)"
COMMAND = (sys.executable, "-P", "-c", _SCRIPT)


class BrokenRunner:
    """A runner on a device that never works again."""

    def run(self, *_arguments: Any) -> Any:
        raise RuntimeError("the device is gone")


def make(path: Path, config: EngineConfig, progress: process.Progress) -> Engine:
    """An engine whose every step raises, unless its folder says otherwise."""
    known = (path / "config.json").exists()
    engine = Engine(path if known else checkpoint("llama-gqa"), config, progress)
    if not (path / "mended").exists():
        engine._runner = BrokenRunner()  # type: ignore[assignment]
    return engine


if __name__ == "__main__":
    process.main(sys.argv[1:], make)
