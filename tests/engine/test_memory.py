"""How much the KV cache may take of what is free."""

from __future__ import annotations

import msgspec
import pytest
import torch

from naiad.core.errors import InvalidSettings
from naiad.engine import memory
from naiad.engine.config import EngineConfig
from naiad.engine.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec

SPEC = ModelSpec(
    architecture="any",
    vocab_size=100,
    hidden_size=64,
    num_layers=3,
    max_positions=512,
    norm=NormSpec("rms", 1e-6),
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25),
    mlp=MlpSpec(128, "silu", gated=True),
)
TOKEN_BYTES = 2 * 3 * 2 * 16 * 2  # keys and values, layers, heads, dim, bf16
CONFIG = EngineConfig(kv_memory_fraction=0.5, kv_page_tokens=8)


def tokens(config: EngineConfig, *, free: int, most: int = 10**9) -> int:
    return memory.cache_tokens(config, SPEC, max_tokens=most, element_bytes=2, free=free)


def test_a_token_takes_its_keys_and_values_in_every_layer() -> None:
    assert SPEC.kv_bytes_per_token(2) == TOKEN_BYTES


def test_the_cache_takes_its_share_of_free_memory() -> None:
    assert tokens(CONFIG, free=TOKEN_BYTES * 1000) == 500


def test_the_cache_never_holds_more_than_all_rows_can_use() -> None:
    assert tokens(CONFIG, free=TOKEN_BYTES * 1000, most=123) == 123
    fixed = msgspec.structs.replace(CONFIG, kv_cache_tokens=200)
    assert tokens(fixed, free=0) == 200
    assert tokens(fixed, free=0, most=123) == 123


def test_less_than_a_page_is_refused_with_the_numbers() -> None:
    assert tokens(CONFIG, free=TOKEN_BYTES * 16) == 8
    with pytest.raises(InvalidSettings, match=r"50% of that holds 7 tokens .* one page of 8"):
        tokens(CONFIG, free=TOKEN_BYTES * 15)


def test_free_memory_of_this_machine_is_positive() -> None:
    assert memory.free_bytes(torch.device("cpu")) > 2**20


def test_tuning_the_allocator_and_pages_changes_no_values() -> None:
    values = torch.arange(2_000_000)

    memory.prepare_heap(1 << 20)
    memory.use_huge_pages()

    assert torch.equal(values, torch.arange(2_000_000))
