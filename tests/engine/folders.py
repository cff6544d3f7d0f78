"""Checkpoint folders to be spoilt: copies of small ones, and edits of their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.driving import checkpoint

WEIGHTS = "model.safetensors"


def copy_of(shape: str, target: Path) -> Path:
    """A checkpoint of `driving.SHAPES` that the caller may change."""
    shutil.copytree(checkpoint(shape), target, dirs_exist_ok=True)
    return target


def edit_json(path: Path, **values: Any) -> None:
    """Set top-level values of a JSON file; ... removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the single weight file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
