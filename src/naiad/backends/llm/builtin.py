"""The model that comes with Naiad, by its name.

The text `builtin` means that model wherever a checkpoint's path is given, so that one command works
in every directory. A folder of that name is `./builtin`, or any `Path` object.
"""

from __future__ import annotations

from pathlib import Path

NAME = "builtin"
FOLDER = Path(__file__).resolve().parents[2] / "models" / "builtin"


def path_of(model: str | Path) -> Path:
    """The folder that `model` names: the built-in one for its name, else the path itself."""
    return FOLDER if model == NAME else Path(model)
