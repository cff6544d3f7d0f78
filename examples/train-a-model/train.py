"""Train a small Llama on Python's standard library, and write it as a Hugging Face folder.

This made the model that comes with Naiad (`naiad serve builtin`), with the default options:

    python examples/train-a-model/train.py my-model
    naiad serve my-model

In order: read the library's sources and split them by file, make documents (whole files, single
functions, conversations made from docstrings), train a byte-level BPE tokenizer, train the decoder,
keep the weights with the least held-out loss, count how many held-out functions it completes, write.
It needs torch, tokenizers, safetensors and numpy, no network, and is quick only on a GPU. The text is
made in `corpus.py`, functions are counted in `quality.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from corpus import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    make_documents,
    pick_functions,
    read_sources,
    to_stream,
    train_tokenizer,
)
from quality import NGram, greedy, score
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, on what, for how long."""

    stdlib: str = sysconfig.get_path("stdlib")
    max_files: int = 0
    """0: all."""
    tests: bool = True
    """Train on the library's tests too; they are never held out."""
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    context_tokens: int = 2048
    dropout: float = 0.2
    num_steps: int = 6000
    batch_rows: int = 32
    """Of `context_tokens` each."""
    learning_rate: float = 4e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    eval_every: int = 500
    num_functions: int = 100
    """Held-out functions to complete at the end."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = torch.cuda.is_available()


# ---------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        hidden, heads, kv_heads = options.hidden_size, options.num_heads, options.num_kv_heads
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`[rows, tokens, hidden]` to the same."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rope), _rotate(k, rope)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        joined: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return joined


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        hidden, inner = options.hidden_size, options.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, tokens, hidden]` to the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention, then the MLP, each added to what came in."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(options.hidden_size, eps=1e-5)
        self.self_attn = Attention(options)
        self.post_attention_layernorm = nn.RMSNorm(options.hidden_size, eps=1e-5)
        self.mlp = Mlp(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`[rows, tokens, hidden]` to the same."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Llama(nn.Module):
    """The decoder; its parameters have the names of Hugging Face's, less `model.`."""

    frequencies: Tensor

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(options.vocab_size, options.hidden_size)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options.num_layers))
        self.norm = nn.RMSNorm(options.hidden_size, eps=1e-5)
        head_dim = options.hidden_size // options.num_heads
        frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = math.sqrt(2 * options.num_layers) if is_last else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)

    def forward(self, ids: Tensor) -> Tensor:
        """`[rows, tokens]` to normed hidden states `[rows, tokens, hidden]`."""
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device), self.frequencies)
        rope = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, rope)
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """By the embedding, transposed: `[..., hidden]` to `[..., vocab]`."""
        return F.linear(hidden, self.embed_tokens.weight)

    def next_logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits after position `at[row]` of each row: `[rows, vocab]`."""
        hidden = self(ids)[torch.arange(len(ids), device=ids.device), at]
        return self.logits(hidden)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats of every token after the first, of `[rows, tokens + 1]`."""
        logits = self.logits(self(ids[:, :-1])).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


# ------------------------------------------------------------------------------------- training


def train(model: Llama, options: Options, stream: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train in place and leave the weights with the least held-out loss; return the history."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = options.device == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)
    loss_of: Callable[[Tensor], Tensor] = model.loss
    if options.compile:
        loss_of = torch.compile(model.loss)
    span = torch.arange(options.context_tokens + 1, device=options.device)
    generator = torch.Generator().manual_seed(options.seed)
    history, best, best_loss = [], {}, math.inf
    began = time.monotonic()
    for step in range(1, options.num_steps + 1):
        model.train()
        starts = torch.randint(
            len(stream) - len(span), (options.batch_rows, 1), generator=generator
        )
        with torch.autocast(options.device, torch.bfloat16, enabled=fused):
            loss = loss_of(stream[starts.to(options.device) + span])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % options.eval_every and step != options.num_steps:
            continue
        held_out_loss, seconds = evaluate(model, held_out, options), time.monotonic() - began
        speed = step * options.batch_rows * options.context_tokens / seconds
        history.append({"step": step, "loss": loss.item(), "held_out_loss": held_out_loss})
        print(
            f"step {step}: loss {loss.item():.3f}, held-out {held_out_loss:.4f}, {speed:,.0f} tokens/s"
        )
        if held_out_loss < best_loss:
            best_loss, best_step = held_out_loss, step
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # What is written is bfloat16: round now, so that everything measured is measured on that.
    model.load_state_dict({name: value.bfloat16().float() for name, value in best.items()})
    return {
        "history": history,
        "best_step": best_step,
        "held_out_loss": evaluate(model, held_out, options),
        "seconds": time.monotonic() - began,
    }


def schedule(step: int, options: Options) -> float:
    """Linear warm-up, then a cosine to zero: a factor of the learning rate."""
    if step < options.warmup_steps:
        return step / options.warmup_steps
    rest = (step - options.warmup_steps) / max(options.num_steps - options.warmup_steps, 1)
    return (1 + math.cos(math.pi * rest)) / 2


@torch.no_grad()
def evaluate(model: Llama, stream: Tensor, options: Options) -> float:
    """Mean loss over the stream, in windows of the context that do not overlap."""
    model.eval()
    size = options.context_tokens
    windows = stream[: (len(stream) - 1) // size * size + 1].unfold(0, size + 1, size)
    losses = []
    for batch in windows.split(options.batch_rows):
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            losses.append(model.loss(batch).item() * len(batch))
    return sum(losses) / len(windows)


# -------------------------------------------------------------------------------------- writing


def write_folder(folder: Path, model: Llama, tokenizer: Tokenizer, options: Options) -> None:
    """Everything that transformers, vLLM and Naiad read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors = {name: value.bfloat16().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    token_ids = {"bos_token_id": 0, "eos_token_id": [1, 4], "pad_token_id": 2}
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": options.hidden_size,
            "intermediate_size": options.intermediate_size,
            "num_hidden_layers": options.num_layers,
            "num_attention_heads": options.num_heads,
            "num_key_value_heads": options.num_kv_heads,
            "head_dim": options.hidden_size // options.num_heads,
            "max_position_embeddings": options.context_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "vocab_size": options.vocab_size,
            "torch_dtype": "bfloat16",
            **token_ids,
        },
        "generation_config.json": {
            "do_sample": True,
            "temperature": 0.4,
            "top_p": 0.9,
            **token_ids,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": options.context_tokens,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, value in files.items():
        _write_json(folder / name, value)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the model in a folder; return what was measured, which is printed too."""
    folder, options = parse(argv)
    warnings.simplefilter("ignore", SyntaxWarning)  # escapes in the library's tests
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    sources, held_out = read_sources(
        Path(options.stdlib), tests=options.tests, max_files=options.max_files
    )
    if not sources or not held_out:
        sys.exit(f"{len(sources)} files to train on, {len(held_out)} held out: take more files")
    documents = make_documents(sources, held_out, options.seed)
    tokenizer = train_tokenizer(documents, options.vocab_size)
    options = dataclasses.replace(options, vocab_size=tokenizer.get_vocab_size())
    stream, held_stream = (to_stream(tokenizer, d) for d in (documents, [*held_out.values()]))
    print(f"{len(stream):,} tokens, {len(held_stream):,} held out in {len(held_out)} files")
    model = Llama(options).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    tokens, held_tokens = (torch.from_numpy(s).to(options.device) for s in (stream, held_stream))
    measured = train(model, options, tokens, held_tokens)
    num_bytes = sum(len(text.encode()) for text in held_out.values())
    num_bits = measured["held_out_loss"] * len(held_stream) / math.log(2)
    measured["held_out_bits_per_byte"] = num_bits / num_bytes
    write_folder(folder, model, tokenizer, options)
    print(f"wrote {folder}: held-out loss {measured['held_out_loss']:.4f}, ", end="")
    print(
        f"{measured['held_out_bits_per_byte']:.4f} bits per byte, of step {measured['best_step']}"
    )
    functions = pick_functions(held_out, sources, options.num_functions)
    measured["functions"] = [function.text for function in functions]
    completers = {
        "decoder": greedy(lambda ids, at: model.next_logits(ids, at), options.device),
        "4-gram": NGram(stream, 4, options.vocab_size).complete,
    }
    for name, complete in completers.items() if functions else ():
        shares, texts = score(functions, tokenizer, complete)
        measured[name] = {**shares, "texts": texts}
        print(f"{name} on {len(functions)} held-out functions: {shares}")
    _write_json(folder / "measured.json", measured)
    return measured


def parse(argv: Sequence[str] | None) -> tuple[Path, Options]:
    """The folder to write, and a flag for each option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    hints = get_type_hints(Options)
    for field in dataclasses.fields(Options):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag, default=field.default, **how)
    values = vars(parser.parse_args(argv))
    return values.pop("folder"), Options(**values)


if __name__ == "__main__":
    main(sys.argv[1:])
