"""Reads a Hugging Face checkpoint folder: `config.json` and safetensors, single or sharded.

Owns finding tensors by name and checking their shapes; it knows nothing of models. Tensors come
memory-mapped, so that a tensor is read once, when an op packs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from naiad.core.errors import InvalidModel

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; raises `InvalidModel` naming the file and the fault."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise InvalidModel(f"{path} does not exist", hint="give a checkpoint folder") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    if not folder.is_dir():
        raise InvalidModel(
            f"{folder} is not a folder",
            hint="give the folder of a Hugging Face checkpoint: config.json, *.safetensors",
        )
    return read_json(folder / "config.json")


class Checkpoint:
    """The tensors of one folder, by name.

    Raises:
        InvalidModel: no safetensors file, an unreadable one, or a shard that the index names is
            missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in self._list_files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 -- not a dict: safe_open is not iterable
                self._file_of[name] = file

    def _list_files(self) -> list[str]:
        index = self._folder / INDEX_NAME
        if index.exists():
            return _files_in(index)
        if not (self._folder / SINGLE_NAME).exists():
            found = ", ".join(sorted(path.name for path in self._folder.iterdir())) or "nothing"
            raise InvalidModel(
                f"{self._folder} has no {SINGLE_NAME} and no {INDEX_NAME}; it has {found}",
                hint="save the checkpoint as safetensors",
            )
        return [SINGLE_NAME]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            try:
                self._files[file] = safe_open(str(path), framework="pt")
            except FileNotFoundError:
                raise InvalidModel(f"{path} is named by {INDEX_NAME} but missing") from None
            except (SafetensorError, OSError) as error:
                raise InvalidModel(f"{path} is not a readable safetensors file: {error}") from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def total_bytes(self) -> int:
        """Size of all weight files, in bytes."""
        return sum((self._folder / file).stat().st_size for file in self._files)

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Tensor `name`, which must have `shape`, in the file's own type.

        Raises:
            InvalidModel: missing or of another shape; the message has found and expected.
        """
        if name not in self._file_of:
            raise InvalidModel(
                f"{self._folder} has no tensor {name!r} (expected shape {list(shape)})",
                hint=f"it has {len(self._file_of)} tensors, such as {self._nearest(name)}",
            )
        handle = self._open(self._file_of[name])
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise InvalidModel(
                f"tensor {name!r} in {self._folder / self._file_of[name]} has shape "
                f"{list(found)}, expected {list(shape)} from config.json"
            )
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def _nearest(self, name: str) -> str:
        import difflib

        near = difflib.get_close_matches(name, self._file_of, n=2, cutoff=0.0)
        return ", ".join(repr(one) for one in near)


def _files_in(index: Path) -> list[str]:
    """The files that an index names, all of them beside it (though they may be links)."""
    weight_map = read_json(index).get("weight_map")
    files: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) for file in files):
        raise InvalidModel(f"{index} has no weight_map from tensor names to file names")
    if not files:
        raise InvalidModel(f"{index} names no file: its weight_map is empty")
    for file in files:
        if "/" in file or file in ("", ".", ".."):
            raise InvalidModel(f"{index} names {file!r}, which is outside the folder")
    return sorted(set(files))
