"""Write a small random checkpoint in Hugging Face's layout, tokenizer included.

For tests and benchmarks: the same options always give the same bytes of weights. The
weights are random but not degenerate (every bias is non-zero, norms are not one, logits spread over
several units), so that an implementation that drops or transposes one of them gives other answers.

    python tools/make_tiny_checkpoint.py tiny-llama
    python tools/make_tiny_checkpoint.py small --hidden-size 768 --intermediate-size 2048 \
        --num-layers 12 --num-heads 12 --num-kv-heads 4 --vocab-size 32000 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
TURN, END_OF_TURN = "<|turn|>", "<|end_of_turn|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, TURN, END_OF_TURN]  # ids 0 to 4
NUM_TRAINED_TOKENS = 384

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end_of_turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs on.",
    "Naiad and Triton are moons of Neptune; a naiad is also the spirit of a river or a spring.",
    "A server answers requests; an engine turns tokens into the next token, one step at a time.",
    "Once upon a time there was a small model that had read one page, and it said what it knew.",
    "In the beginning the weights were random, and the loss was the logarithm of the vocabulary.",
    "0 1 2 3 4 5 6 7 8 9 10 20 30 40 50 60 70 80 90 100 1000 1024 2048 4096",
    "def main(): return [x for x in range(10) if x % 2 == 0]",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Où est la bibliothèque ?",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyCheckpoint:
    """What to write. The defaults make a model of about 0.2 M parameters."""

    family: Literal["llama", "gpt2"] = "llama"
    seed: int = 0
    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    """Llama only; GPT-2 has as many as heads."""
    head_dim: int = 0
    """Llama only; 0: hidden_size / num_heads."""
    max_positions: int = 512
    rope_theta: float = 10_000.0
    tied: bool = False
    """Llama only: the output head is the embedding. GPT-2's always is."""
    attention_bias: bool = False
    """Llama only: biases on the attention projections. GPT-2 always has them."""
    bare_names: bool = False
    """GPT-2 only: no `transformer.` before tensor names, as in the Hub's `gpt2`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_shards: int = 1
    """More than 1: that many safetensors files and an index."""
    chat_template: bool = True
    readable: bool = False
    """Llama only, untied: almost only tokens of two or more letters are ever chosen."""


def write_checkpoint(folder: str | Path, **options: Any) -> Path:
    """Write the checkpoint that `TinyCheckpoint(**options)` describes, and return its folder."""
    spec = TinyCheckpoint(**options)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    make_tensors, make_config = _FAMILIES[spec.family]
    dtype = getattr(torch, spec.dtype)
    tokenizer = make_tokenizer(add_bos=spec.family == "llama")
    tensors = make_tensors(spec)
    if spec.readable:
        _prefer_words(tensors["lm_head.weight"], tokenizer)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    _write_tensors(path, tensors, spec.num_shards)
    _write_json(path / "config.json", make_config(spec) | _common_config(spec))
    _write_json(path / "generation_config.json", _token_ids())
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(path / "tokenizer_config.json", _tokenizer_config(spec))
    return path


def make_tokenizer(*, add_bos: bool) -> Tokenizer:
    """A byte-level BPE tokenizer of 384 tokens; any text encodes and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TRAINED_TOKENS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
        )
    return tokenizer


class _Random:
    """Random tensors whose sizes keep activations near one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=self._generator)

    def linear(self, num_out: int, num_in: int) -> torch.Tensor:
        return self.normal(num_out, num_in, std=num_in**-0.5)

    def norm(self, size: int) -> torch.Tensor:
        return self.normal(size, std=0.1, mean=1.0)

    def bias(self, size: int) -> torch.Tensor:
        return self.normal(size, std=0.1)


def _llama_tensors(spec: TinyCheckpoint) -> dict[str, torch.Tensor]:
    random = _Random(spec.seed)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    head_dim = spec.head_dim or hidden // spec.num_heads
    query, key = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    tensors = {"model.embed_tokens.weight": random.normal(spec.vocab_size, hidden, std=0.25)}
    for number in range(spec.num_layers):
        layer = f"model.layers.{number}"
        tensors[f"{layer}.input_layernorm.weight"] = random.norm(hidden)
        for name, num_out, num_in in (
            ("q_proj", query, hidden),
            ("k_proj", key, hidden),
            ("v_proj", key, hidden),
            ("o_proj", hidden, query),
        ):
            tensors[f"{layer}.self_attn.{name}.weight"] = random.linear(num_out, num_in)
            if spec.attention_bias:
                tensors[f"{layer}.self_attn.{name}.bias"] = random.bias(num_out)
        tensors[f"{layer}.post_attention_layernorm.weight"] = random.norm(hidden)
        tensors[f"{layer}.mlp.gate_proj.weight"] = random.linear(inner, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = random.linear(inner, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = random.linear(hidden, inner)
    tensors["model.norm.weight"] = random.norm(hidden)
    if not spec.tied:
        tensors["lm_head.weight"] = 2 * random.linear(spec.vocab_size, hidden)
    return tensors


def _prefer_words(head: torch.Tensor, tokenizer: Tokenizer) -> None:
    """Zero the head's rows but those of words: among so many, some logit is well above zero."""
    for token_id in range(len(head)):
        is_word = re.fullmatch(r" ?[A-Za-z]{2,}", tokenizer.decode([token_id]))
        head[token_id] *= 4 if is_word else 0


def _llama_config(spec: TinyCheckpoint) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim or spec.hidden_size // spec.num_heads,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.attention_bias,
        "mlp_bias": False,
    }


def _gpt2_tensors(spec: TinyCheckpoint) -> dict[str, torch.Tensor]:
    random = _Random(spec.seed)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    prefix = "" if spec.bare_names else "transformer."
    tensors = {
        f"{prefix}wte.weight": random.normal(spec.vocab_size, hidden, std=0.25),
        f"{prefix}wpe.weight": random.normal(spec.max_positions, hidden, std=0.1),
    }
    for number in range(spec.num_layers):
        layer = f"{prefix}h.{number}"
        for name, num_out, num_in in (
            ("attn.c_attn", 3 * hidden, hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", inner, hidden),
            ("mlp.c_proj", hidden, inner),
        ):
            # GPT-2's Conv1D keeps its weight as [in, out].
            tensors[f"{layer}.{name}.weight"] = random.linear(num_out, num_in).T
            tensors[f"{layer}.{name}.bias"] = random.bias(num_out)
        for name in ("ln_1", "ln_2"):
            tensors[f"{layer}.{name}.weight"] = random.norm(hidden)
            tensors[f"{layer}.{name}.bias"] = random.bias(hidden)
    tensors[f"{prefix}ln_f.weight"] = random.norm(hidden)
    tensors[f"{prefix}ln_f.bias"] = random.bias(hidden)
    return tensors


def _gpt2_config(spec: TinyCheckpoint) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": spec.hidden_size,
        "n_inner": spec.intermediate_size,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_positions": spec.max_positions,
        "n_ctx": spec.max_positions,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }


_FAMILIES = {
    "llama": (_llama_tensors, _llama_config),
    "gpt2": (_gpt2_tensors, _gpt2_config),
}


def _common_config(spec: TinyCheckpoint) -> dict[str, Any]:
    return {"vocab_size": spec.vocab_size, "torch_dtype": spec.dtype, **_token_ids()}


def _token_ids() -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    return {
        "bos_token_id": ids[BOS],
        "eos_token_id": [ids[EOS], ids[END_OF_TURN]],
        "pad_token_id": ids[PAD],
    }


def _tokenizer_config(spec: TinyCheckpoint) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": spec.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    return config | ({"chat_template": CHAT_TEMPLATE} if spec.chat_template else {})


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        chosen = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(chosen, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _parse(argv: list[str] | None) -> tuple[Path, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    hints = get_type_hints(TinyCheckpoint)
    for field in dataclasses.fields(TinyCheckpoint):
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        if hint is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=field.default)
        elif choices := getattr(hint, "__args__", None):
            parser.add_argument(flag, choices=choices, default=field.default)
        else:
            parser.add_argument(flag, type=hint, default=field.default)
    options = vars(parser.parse_args(argv))
    return options.pop("folder"), options


if __name__ == "__main__":
    target, chosen_options = _parse(None)
    write_checkpoint(target, **chosen_options)
