"""From a folder and a configuration to an engine: what "auto" comes to, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from naiad.core.errors import InvalidModel, InvalidSettings, Unavailable
from naiad.engine.config import EngineConfig
from naiad.engine.engine import Engine
from naiad.engine.kv.pages import PageManager
from naiad.engine.kv.slots import SlotManager
from naiad.engine.kv.storage import SlotStorage
from naiad.engine.loading import Loaded, load
from tests.engine.driving import checkpoint
from tests.engine.folders import copy_of, edit_json

SHAPE = "llama-gqa"


def loaded(folder: Path | None = None, **options: Any) -> Loaded:
    defaults = {"device": "cpu", "kv_cache_tokens": 1024, "num_threads": torch.get_num_threads()}
    path = folder or checkpoint(SHAPE)
    return load(path, EngineConfig(**(defaults | options)), lambda fraction, text: None)


def test_auto_on_a_cpu_is_slots_and_the_dtype_of_the_checkpoint() -> None:
    found = loaded(kv_cache_tokens=0)

    assert isinstance(found.kv, SlotManager)
    assert isinstance(found.runner._storage, SlotStorage)
    assert found.info.dtype == "float32"
    assert found.info.architecture == "LlamaForCausalLM"
    assert found.info.device.startswith("cpu")
    assert found.info.max_model_len == 512
    assert found.info.max_num_seqs == 64
    assert found.info.kv_capacity_tokens == 64 * 512, "all that could ever be used, not more"
    assert found.limits.max_num_batched_tokens == 1024


def test_pages_hold_what_was_asked_for() -> None:
    found = loaded(kv_layout="pages", kv_page_tokens=16, kv_cache_tokens=100)

    assert isinstance(found.kv, PageManager)
    assert found.info.kv_capacity_tokens == 96, "whole pages"
    assert found.info.max_model_len == 96, "what one sequence can use of the cache"


def test_parameters_are_counted_and_the_budget_adds_up() -> None:
    info = loaded().info
    budget = dict(info.memory)
    kv_bytes = 1024 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, dim, fp32

    assert info.num_parameters == sum(
        t.numel() for t in _reference_parameters(checkpoint(SHAPE)).values()
    )
    assert budget["weights"] == 4 * info.num_parameters
    assert budget["KV cache, 1024 tokens as slots"] == kv_bytes
    spent = budget["weights"] + kv_bytes + budget["left"]
    assert spent == budget["free before loading"]


def _reference_parameters(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_progress_ends_at_one_and_never_goes_back() -> None:
    seen: list[tuple[float, str]] = []
    config = EngineConfig(device="cpu", kv_cache_tokens=256)

    load(checkpoint(SHAPE), config, lambda fraction, text: seen.append((fraction, text)))

    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == (1.0, "weights loaded")
    assert ("layer 2/2") in [text for _, text in seen]


def test_a_context_beyond_the_checkpoint_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        InvalidSettings, match=r"max_model_len 513 exceeds .* 512 positions"
    ) as error:
        loaded(max_model_len=513)

    assert "--max-model-len 512" in error.value.hint
    assert loaded(max_model_len=512).info.max_model_len == 512


def test_a_cache_that_fits_no_page_into_memory_is_refused() -> None:
    with pytest.raises(
        InvalidSettings, match=r"MiB are free .* fewer than one page of 64"
    ) as error:
        loaded(kv_cache_tokens=0, kv_memory_fraction=1e-12)

    assert "--kv-memory-fraction" in error.value.hint


def test_cuda_without_a_device_is_unavailable() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(Unavailable, match="no CUDA device"):
        loaded(device="cuda")


def test_an_unknown_dtype_of_the_checkpoint_is_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    folder = copy_of(SHAPE, tmp_path)
    edit_json(folder / "config.json", torch_dtype="float8_e4m3fn")

    with pytest.raises(InvalidSettings, match=r"float8_e4m3fn.*implemented: bfloat16") as error:
        loaded(folder)

    assert "--dtype" in error.value.hint
    assert loaded(folder, dtype="float32").info.dtype == "float32"


def test_half_precision_runs_as_bfloat16_on_a_cpu_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = copy_of(SHAPE, tmp_path)
    edit_json(folder / "config.json", torch_dtype="float16")

    assert loaded(folder).info.dtype == "bfloat16"
    assert loaded(folder, dtype="float16", ops="reference").info.dtype == "float16"


def test_an_engine_on_a_folder_that_is_no_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"config\.json does not exist"):
        Engine(tmp_path, EngineConfig(device="cpu"))
    with pytest.raises(InvalidModel, match="is not a folder"):
        Engine(tmp_path / "nowhere", EngineConfig(device="cpu"))
