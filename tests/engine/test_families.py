"""What `config.json` says becomes a spec, or is refused by name; tensors are found by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from naiad.core.errors import InvalidModel
from naiad.engine.checkpoint import Checkpoint
from naiad.engine.decoder import Decoder
from naiad.engine.families import FAMILIES, family_of
from naiad.engine.ops.base import Target
from naiad.engine.ops.table import OpTable
from naiad.engine.spec import ModelSpec, RopeSpec
from tests.engine import golden
from tests.engine.driving import MAX_LEN, Setup, checkpoint, tokens_of
from tests.engine.folders import copy_of, edit_json, edit_tensors


def config_of(shape: str, **values: Any) -> dict[str, Any]:
    """A shape's `config.json` with other values; ... removes one."""
    config = json.loads((checkpoint(shape) / "config.json").read_text()) | values
    return {name: value for name, value in config.items() if value is not ...}


def spec_of(shape: str, **values: Any) -> ModelSpec:
    config = config_of(shape, **values)
    return family_of(config).spec(config)


def load(folder: Path) -> Decoder:
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    target = Target(torch.device("cpu"), torch.float32, MAX_LEN, MAX_LEN)
    return Decoder(family.spec(config), family, Checkpoint(folder), OpTable("reference", target))


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(InvalidModel, match="names FalconForCausalLM, which") as refusal:
        family_of({"architectures": ["FalconForCausalLM"]})

    assert all(name in refusal.value.hint for name in FAMILIES)


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}])
def test_a_config_without_architecture_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match="no architecture"):
        family_of(config)


@pytest.mark.parametrize("names", ["FalconForCausalLM", 7, [7], [["LlamaForCausalLM"]]])
def test_an_architecture_of_the_wrong_type_is_refused(names: Any) -> None:
    with pytest.raises(InvalidModel, match="which Naiad does not run"):
        family_of({"architectures": names})


LLAMA_SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
]
GPT2_SIZES = ["vocab_size", "n_embd", "n_head", "n_layer", "n_positions"]


@pytest.mark.parametrize(
    ("shape", "name"),
    [("llama-gqa", name) for name in LLAMA_SIZES] + [("gpt2", name) for name in GPT2_SIZES],
)
def test_a_size_that_is_missing_or_not_a_size_is_named(shape: str, name: str) -> None:
    with pytest.raises(InvalidModel, match=f"lacks '{name}'"):
        spec_of(shape, **{name: ...})
    for value in ("64", 0, -1, 2.5, True, [1]):
        with pytest.raises(InvalidModel, match=f"{name} = .*expected a positive integer"):
            spec_of(shape, **{name: value})


@pytest.mark.parametrize(
    ("shape", "values", "words"),
    [
        ("llama-gqa", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; implemented: 'silu'"),
        ("gpt2", {"activation_function": "swish"}, "activation_function = 'swish'; implemented"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            "llama-gqa",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "RoPE scaling 'llama3'; implemented: 'default'",
        ),
        ("llama-gqa", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaling 'linear'"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn'"),
        ("llama-gqa", {"rope_scaling": "linear"}, "RoPE parameters 'linear'"),
        ("llama-gqa", {"rope_theta": "ten"}, "rope_theta = 'ten', expected a number"),
        ("llama-gqa", {"rms_norm_eps": None}, "rms_norm_eps = None, expected a number"),
        (
            "llama-gqa",
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads = 4, not a multiple of num_key_value_heads = 3",
        ),
        (
            "llama-gqa",
            {"num_attention_heads": 6, "head_dim": ...},
            "hidden_size = 64, not a multiple of num_attention_heads = 6",
        ),
        ("gpt2", {"n_head": 7}, "n_embd = 64, not a multiple of n_head = 7"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_and_value(
    shape: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidModel, match=words):
        spec_of(shape, **values)


def test_values_left_out_have_the_defaults_of_transformers() -> None:
    spec = spec_of(
        "llama-gqa",
        **dict.fromkeys(
            ["num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "hidden_act"], ...
        ),
    )

    assert spec.attention.num_kv_heads == 4
    assert spec.attention.head_dim == 16
    assert spec.attention.rope == RopeSpec(10_000.0)
    assert spec.norm.eps == 1e-6
    assert spec_of("gpt2", n_inner=None).mlp.intermediate_size == 256
    assert spec_of("gpt2", scale_attn_weights=False).attention.scale == 1.0


def test_rope_is_read_in_both_spellings() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e6}

    assert spec_of("llama-gqa", rope_parameters=parameters).attention.rope == RopeSpec(1e6)
    assert spec_of("llama-gqa", rope_scaling=None, rope_theta=5e5).attention.rope == RopeSpec(5e5)
    assert spec_of("llama-gqa", torch_dtype=..., dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("shape", ["llama-gqa", "llama-mha-tied-biased", "gpt2", "gpt2-bare-names"])
def test_every_tensor_of_a_checkpoint_is_needed_and_named_when_it_is_missing(
    shape: str, tmp_path: Path
) -> None:
    names = list(Checkpoint(checkpoint(shape))._file_of)
    for name in names[:: max(len(names) // 12, 1)] + [n for n in names if n.endswith("bias")][:3]:
        folder = copy_of(shape, tmp_path / "copy")
        edit_tensors(folder, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        with pytest.raises(InvalidModel, match="has no tensor") as refusal:
            load(folder)
        stem = name.removeprefix("transformer.").removeprefix("model.")
        assert stem in str(refusal.value)


def test_a_misshapen_tensor_is_refused_with_found_and_expected(tmp_path: Path) -> None:
    folder = copy_of("gpt2", tmp_path)
    edit_json(folder / "config.json", n_inner=100)

    with pytest.raises(InvalidModel, match=r"h\.0\.mlp\.c_fc\.weight.*\[64, 128\].*\[64, 100\]"):
        load(folder)


def test_a_head_of_its_own_is_required_where_it_is_not_tied(tmp_path: Path) -> None:
    folder = copy_of("gpt2", tmp_path)
    edit_json(folder / "config.json", tie_word_embeddings=False)

    with pytest.raises(InvalidModel, match=r"no tensor 'lm_head\.weight'"):
        load(folder)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama-gqa", {"rope_theta": 100.0, "rms_norm_eps": 0.1}),
        ("llama-mha-tied-biased", {"mlp_bias": True}),
    ],
)
@pytest.mark.parametrize("ops", ["reference", "cpu"])
def test_config_values_mean_what_they_mean_to_transformers(
    shape: str, values: dict[str, Any], ops: str, tmp_path: Path
) -> None:
    folder = copy_of(shape, tmp_path)
    edit_json(folder / "config.json", **values)

    def add_what_the_config_asks_for(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        if values.get("tie_word_embeddings") is False:
            tensors["lm_head.weight"] = torch.randn(512, 64, generator=generator) / 4
        if values.get("mlp_bias"):
            for name in [name for name in tensors if ".mlp." in name]:
                bias = torch.randn(len(tensors[name]), generator=generator)
                tensors[name.replace("weight", "bias")] = bias

    edit_tensors(folder, add_what_the_config_asks_for)
    run = golden.DecoderRun(folder, Setup(ops=ops, layout="slots"))
    tokens = tokens_of(0, 40)
    run.start(len(tokens))

    found = run.step([(0, 0, tokens)])[0]

    wanted = golden.reference_logits(folder, tuple(tokens))
    assert golden.difference(found, wanted)["max_abs_error"] < 1e-4
