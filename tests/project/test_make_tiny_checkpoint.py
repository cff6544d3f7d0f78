"""The checkpoints that tests use are ones that transformers itself can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from tools.make_tiny_checkpoint import write_checkpoint  # noqa: E402 - needs the extras above

VARIANTS: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "llama", "tied": True, "attention_bias": True, "head_dim": 32, "num_shards": 3},
    {"family": "gpt2"},
    {"family": "gpt2", "bare_names": True, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_transformers_loads_every_tensor(options: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_checkpoint(tmp_path / "model", **options)

    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == getattr(torch, options.get("dtype", "float32"))

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "Grüße, 世界 🌊: the fox"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) == (options["family"] == "llama")
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("hi<|end_of_turn|>\n<|turn|>assistant\n")

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.isfinite().all()
    assert logits.float().std() > 0.5, "logits so close together make greedy tests fragile"


def test_the_same_options_give_the_same_weights(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", seed=7) / "model.safetensors"
    second = write_checkpoint(tmp_path / "b", seed=7) / "model.safetensors"
    other = write_checkpoint(tmp_path / "c", seed=8) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_shards_are_listed_in_an_index(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, num_shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {file.name for file in path.glob("*.safetensors")}
    assert len(files) == 2
