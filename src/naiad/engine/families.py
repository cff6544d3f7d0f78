"""Which architectures load, how their `config.json` reads and what their tensors are called.

One `Family` per architecture name; everything else about a model is in its `ModelSpec`. Values of a
config that would change the result and are not implemented are refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from naiad.core.errors import InvalidModel
from naiad.engine.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

Config = Mapping[str, Any]


class LayerNames(msgspec.Struct, frozen=True):
    """Tensor name stems of one layer, after the layer's prefix; `.weight`/`.bias` are appended."""

    attention_norm: str
    qkv: tuple[str, ...]
    """Parts stacked in this order: queries, keys, values."""
    attention_out: str
    mlp_norm: str
    mlp_in: tuple[str, ...]
    """Gate and up, or up alone."""
    mlp_out: str


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How one architecture is read."""

    spec: Callable[[Config], ModelSpec]
    prefix: str
    """Of every tensor but the head; files written without it load too."""
    embed: str
    positions: str | None = None
    final_norm: str
    head: str = "lm_head"
    layer_prefix: str
    """With `{}` for the layer's number."""
    layer: LayerNames
    transposed: bool = False
    """True: linear weights are stored [in, out] (GPT-2's Conv1D)."""


def require(config: Config, name: str) -> int:
    """A size in `config.json` that has no default; raises `InvalidModel` naming it."""
    value = config.get(name)
    if value is None:
        raise InvalidModel(f"config.json lacks {name!r}", hint="the checkpoint is incomplete")
    if type(value) is not int or value < 1:
        raise InvalidModel(f"config.json has {name} = {value!r}, expected a positive integer")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise InvalidModel(f"config.json has {name} = {value!r}, expected a number")
    return float(value)


def _divide(config: Config, whole: str, part: str) -> int:
    """How many times `part` goes into `whole`, which it must do without a rest."""
    total, size = require(config, whole), require(config, part)
    if total % size:
        raise InvalidModel(f"config.json has {whole} = {total}, not a multiple of {part} = {size}")
    return total // size


def refuse_unless(config: Config, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
    """The value of `name`, if it is one that is implemented."""
    value = config.get(name, default)
    if value not in allowed:
        known = ", ".join(repr(one) for one in allowed)
        raise InvalidModel(f"config.json has {name} = {value!r}; implemented: {known}")
    return value


def dtype_name(config: Config) -> str:
    """The checkpoint's own type; both spellings that transformers has used."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _llama_rope(config: Config) -> RopeSpec:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InvalidModel(f"config.json has RoPE parameters {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InvalidModel(f"config.json has RoPE scaling {kind!r}; implemented: 'default'")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return RopeSpec(theta=_number("rope_theta", theta))


def _llama_spec(config: Config) -> ModelSpec:
    refuse_unless(config, "hidden_act", ("silu",), "silu")
    heads = kv_heads = require(config, "num_attention_heads")
    if config.get("num_key_value_heads") is not None:
        kv_heads = heads // _divide(config, "num_attention_heads", "num_key_value_heads")
    if config.get("head_dim") is not None:
        head_dim = require(config, "head_dim")
    else:
        head_dim = _divide(config, "hidden_size", "num_attention_heads")
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=require(config, "vocab_size"),
        hidden_size=require(config, "hidden_size"),
        num_layers=require(config, "num_hidden_layers"),
        max_positions=require(config, "max_position_embeddings"),
        norm=NormSpec("rms", _number("rms_norm_eps", config.get("rms_norm_eps", 1e-6))),
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=_llama_rope(config),
        ),
        mlp=MlpSpec(require(config, "intermediate_size"), "silu", gated=True),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype_name(config),
    )


def _gpt2_spec(config: Config) -> ModelSpec:
    act = refuse_unless(config, "activation_function", ("gelu_new", "gelu", "relu"), "gelu_new")
    refuse_unless(config, "scale_attn_by_inverse_layer_idx", (False, None), default=False)
    hidden, heads = require(config, "n_embd"), require(config, "n_head")
    head_dim = _divide(config, "n_embd", "n_head")
    scaled = config.get("scale_attn_weights", True)
    return ModelSpec(
        architecture="GPT2LMHeadModel",
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=require(config, "n_layer"),
        max_positions=require(config, "n_positions"),
        norm=NormSpec(
            "layer", _number("layer_norm_epsilon", config.get("layer_norm_epsilon", 1e-5))
        ),
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if scaled else 1.0,
        ),
        mlp=MlpSpec(
            4 * hidden if config.get("n_inner") is None else require(config, "n_inner"),
            "gelu_tanh" if act == "gelu_new" else act,
            gated=False,
        ),
        attention_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tied_head=bool(config.get("tie_word_embeddings", True)),
        dtype=dtype_name(config),
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        spec=_llama_spec,
        prefix="model.",
        embed="embed_tokens",
        final_norm="norm",
        layer_prefix="layers.{}.",
        layer=LayerNames(
            attention_norm="input_layernorm",
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_out="self_attn.o_proj",
            mlp_norm="post_attention_layernorm",
            mlp_in=("mlp.gate_proj", "mlp.up_proj"),
            mlp_out="mlp.down_proj",
        ),
    ),
    "GPT2LMHeadModel": Family(
        spec=_gpt2_spec,
        prefix="transformer.",
        embed="wte",
        positions="wpe",
        final_norm="ln_f",
        layer_prefix="h.{}.",
        layer=LayerNames(
            attention_norm="ln_1",
            qkv=("attn.c_attn",),
            attention_out="attn.c_proj",
            mlp_norm="ln_2",
            mlp_in=("mlp.c_fc",),
            mlp_out="mlp.c_proj",
        ),
        transposed=True,
    ),
}


def family_of(config: Config) -> Family:
    """The family of a checkpoint's `config.json`.

    Raises:
        InvalidModel: an architecture that is not in `FAMILIES`; the message lists those that are.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list):
        names = [names]
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    found = ", ".join(map(str, names)) or "no architecture"
    raise InvalidModel(
        f"config.json names {found}, which Naiad does not run",
        hint=f"supported: {', '.join(sorted(FAMILIES))}",
    )
