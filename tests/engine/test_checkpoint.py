"""Reading checkpoint folders: what is wrong with one is said by file, tensor, found and expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from naiad.core.errors import InvalidModel
from naiad.engine.checkpoint import INDEX_NAME, Checkpoint, read_config
from tests.engine.driving import checkpoint
from tests.engine.folders import WEIGHTS, copy_of

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return copy_of("llama-gqa", tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return copy_of("llama-mqa-wide-heads", tmp_path / "sharded")


def edit_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_a_tensor_comes_by_name_in_the_type_of_the_file(single: Path) -> None:
    tensor = Checkpoint(single).take(EMBEDDING, (512, 64))

    assert tensor.shape == (512, 64)
    assert tensor.dtype == torch.float32


def test_shards_hold_together_what_a_single_file_holds(tmp_path: Path) -> None:
    from tests.engine.driving import SHAPES
    from tools.make_tiny_checkpoint import write_checkpoint

    options = SHAPES["llama-mqa-wide-heads"] | {"num_shards": 1}
    one, many = (
        Checkpoint(write_checkpoint(tmp_path / "one", **options)),
        checkpoint("llama-mqa-wide-heads"),
    )
    sharded = Checkpoint(many)
    names = json.loads((many / INDEX_NAME).read_text())["weight_map"]

    assert len(set(names.values())) == 2
    for name in names:
        assert name in one
        shape = tuple(one._files[WEIGHTS].get_slice(name).get_shape())
        assert torch.equal(one.take(name, shape), sharded.take(name, shape))


def test_a_missing_tensor_is_named_with_the_shape_that_was_expected(single: Path) -> None:
    with pytest.raises(InvalidModel) as refusal:
        Checkpoint(single).take("model.embed_token.weight", (512, 64))

    assert "'model.embed_token.weight'" in str(refusal.value)
    assert "[512, 64]" in str(refusal.value)
    assert repr(EMBEDDING) in refusal.value.hint, "the nearest names help against a typo"


def test_a_misshapen_tensor_is_named_with_found_and_expected(single: Path) -> None:
    with pytest.raises(
        InvalidModel, match=r"has shape \[512, 64\], expected \[500, 64\]"
    ) as refusal:
        Checkpoint(single).take(EMBEDDING, (500, 64))

    assert WEIGHTS in str(refusal.value)
    assert EMBEDDING in str(refusal.value)


def test_a_folder_without_weights_says_what_it_has(single: Path) -> None:
    (single / WEIGHTS).rename(single / "pytorch_model.bin")

    with pytest.raises(InvalidModel, match=r"no model\.safetensors.*pytorch_model\.bin"):
        Checkpoint(single)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(InvalidModel, match=r"model-00002-of-00002\.safetensors .*missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1000])
def test_a_truncated_file_is_named(single: Path, num_bytes: int) -> None:
    content = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_bytes(content[:num_bytes])

    with pytest.raises(InvalidModel, match=r"model\.safetensors is not a readable safetensors"):
        Checkpoint(single)


def test_a_file_with_a_broken_header_is_named(single: Path) -> None:
    content = bytearray((single / WEIGHTS).read_bytes())
    content[8:40] = b"\xff" * 32
    (single / WEIGHTS).write_bytes(bytes(content))

    with pytest.raises(InvalidModel, match=r"model\.safetensors is not a readable safetensors"):
        Checkpoint(single)


def test_a_folder_in_the_place_of_weights_is_refused(single: Path) -> None:
    (single / WEIGHTS).unlink()
    (single / WEIGHTS).mkdir()

    with pytest.raises(InvalidModel, match=r"model\.safetensors is not a readable safetensors"):
        Checkpoint(single)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ""]
)
def test_an_index_reaches_no_file_outside_the_folder(sharded: Path, name: str) -> None:
    edit_index(sharded, {EMBEDDING: name})

    with pytest.raises(InvalidModel, match="outside the folder"):
        Checkpoint(sharded)


def test_a_shard_may_be_a_link_as_in_the_cache_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    blob = tmp_path / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)

    assert EMBEDDING in Checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [[], "files", 7, None, {EMBEDDING: 3}])
def test_an_index_that_maps_no_names_to_files_is_refused(sharded: Path, weight_map: object) -> None:
    edit_index(sharded, weight_map)

    with pytest.raises(InvalidModel, match="weight_map"):
        Checkpoint(sharded)


def test_an_index_that_names_no_file_is_refused(sharded: Path) -> None:
    edit_index(sharded, {})

    with pytest.raises(InvalidModel, match="names no file"):
        Checkpoint(sharded)


def test_a_config_that_is_missing_or_unreadable_is_named(single: Path) -> None:
    config = single / "config.json"

    config.write_text('{"architectures": [')
    with pytest.raises(InvalidModel, match=r"config\.json cannot be read"):
        read_config(single)
    config.write_text("[]")
    with pytest.raises(InvalidModel, match=r"config\.json holds a list, not an object"):
        read_config(single)
    config.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InvalidModel, match=r"config\.json cannot be read"):
        read_config(single)
    config.unlink()
    with pytest.raises(InvalidModel, match=r"config\.json does not exist"):
        read_config(single)


def test_a_path_that_is_no_folder_is_refused(single: Path) -> None:
    with pytest.raises(InvalidModel, match="is not a folder") as refusal:
        read_config(single / "config.json")

    assert "config.json, *.safetensors" in refusal.value.hint
