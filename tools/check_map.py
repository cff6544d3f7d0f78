"""Fail unless docs/map.md names every package of src/naiad, each module of core and engine, no more.

The map's entries are list items that begin with a path: "- `engine/kv/`: ..." for a package,
"- `core/errors.py`: ..." for a module.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES_OF = ("core", "engine")
_ENTRY = re.compile(r"^\s*- `([\w/]+(?:/|\.py))`", re.MULTILINE)


def wanted(package: Path) -> set[str]:
    """Every path the map must name."""
    found = set()
    for file in package.rglob("*.py"):
        path = file.relative_to(package)
        if file.name == "__init__.py":
            if path.parent.parts:
                found.add(f"{path.parent.as_posix()}/")
        elif path.parts[0] in MODULES_OF:
            found.add(path.as_posix())
    return found


def problems(package: Path, text: str) -> list[str]:
    """One line for every path that is missing, absent from the tree, or named twice."""
    named = _ENTRY.findall(text)
    must = wanted(package)
    return [
        *(f"docs/map.md: {path} is missing" for path in sorted(must - set(named))),
        *(f"docs/map.md: {path} does not exist" for path in named if not (package / path).exists()),
        *(
            f"docs/map.md: {path} twice"
            for path in sorted({p for p in named if named.count(p) > 1})
        ),
    ]


def main() -> int:
    """Check the repository; print what is wrong."""
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    found = problems(ROOT / "src" / "naiad", text)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
