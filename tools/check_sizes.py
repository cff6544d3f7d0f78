"""Fail when a file exceeds 500 lines or a function 60, unless size_exceptions.txt says why.

Every Python file that git knows or would add counts, tests included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = Path(__file__).with_name("size_exceptions.txt")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def measure(name: str, source: str) -> Iterator[tuple[str, int, int]]:
    """Name, lines and limit of a file and of every function in it.

    A function's lines include its signature and docstring, not its decorators.
    """
    yield name, len(source.splitlines()), MAX_FILE_LINES
    yield from _functions(f"{name}::", ast.parse(source))


def _functions(prefix: str, node: ast.AST) -> Iterator[tuple[str, int, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                num_lines = (child.end_lineno or child.lineno) - child.lineno + 1
                yield name, num_lines, MAX_FUNCTION_LINES
            yield from _functions(f"{name}.", child)
        else:
            yield from _functions(prefix, child)


def read_exceptions(text: str) -> dict[str, str]:
    """Name and reason of every exception listed."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    pairs = [line.rpartition(": ")[::2] for line in lines]
    return {name.strip(): reason.strip() for name, reason in pairs}


def problems(sources: dict[str, str], exceptions: dict[str, str]) -> list[str]:
    """One line for everything too long without a reason, and for every stale exception."""
    too_long = {
        name: f"{name}: {num_lines} lines, the limit is {limit}"
        for file, source in sources.items()
        for name, num_lines, limit in measure(file, source)
        if num_lines > limit
    }
    found = [text for name, text in too_long.items() if not exceptions.get(name)]
    stale = [f"{name}: listed in {EXCEPTIONS.name}, but within limits" for name in exceptions]
    return found + [
        text for name, text in zip(exceptions, stale, strict=True) if name not in too_long
    ]


def main() -> int:
    """Check the repository; print what is wrong."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in files}
    found = problems(sources, read_exceptions(EXCEPTIONS.read_text(encoding="utf-8")))
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
