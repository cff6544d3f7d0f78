"""Fail when `naiad --help` imports what only a command may need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "grpc", "numpy", "starlette", "uvicorn", "tokenizers", "transformers")
_PROGRAM = """
import sys
from naiad.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*[name for name in sys.argv[1:] if name in sys.modules], file=sys.stderr)
"""


def imported() -> list[str]:
    """The heavy modules that are loaded once the help text has been printed."""
    command = [sys.executable, "-c", _PROGRAM, *HEAVY]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "serve" in ran.stdout, "the help text was not printed"
    return ran.stderr.split()


if __name__ == "__main__":
    if found := imported():
        sys.exit(f"`naiad --help` imports {', '.join(found)}")
