"""The one decoder: reads a checkpoint by its family's names and runs its layers through the op table.

Owns the order of ops and the merging of weights; knows nothing of requests, scheduling or sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from naiad.engine.batch import StepBatch
from naiad.engine.checkpoint import Checkpoint
from naiad.engine.families import Family
from naiad.engine.kv.storage import KvStorage
from naiad.engine.ops.base import Linear, LinearResidual, Norm, NormLinear
from naiad.engine.ops.table import OpTable
from naiad.engine.spec import ModelSpec

Progress = Callable[[float, str], None]

TUNING_BYTES = 256 << 20
"""Tuning runs this much of the weights: more than caches hold, little enough to take no time."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The prepared ops of one layer, but for attention, which all layers share."""

    qkv: NormLinear
    attention_out: LinearResidual
    mlp_in: NormLinear
    mlp_out: LinearResidual


class WeightReader:
    """Tensors of one checkpoint under its family's names, merged and turned as the ops want them."""

    def __init__(self, checkpoint: Checkpoint, family: Family, spec: ModelSpec) -> None:
        self._checkpoint, self._family, self._spec = checkpoint, family, spec
        self.num_parameters = 0

    def take(self, stem: str, *shape: int) -> torch.Tensor:
        """Tensor `prefix + stem` (or `stem` alone, where the file has no prefix)."""
        name = self._family.prefix + stem
        if name not in self._checkpoint and stem in self._checkpoint:
            name = stem
        tensor = self._checkpoint.take(name, shape)
        self.num_parameters += tensor.numel()
        return tensor

    def has(self, stem: str) -> bool:
        """Whether `take` would find it."""
        return self._family.prefix + stem in self._checkpoint or stem in self._checkpoint

    def norm(self, stem: str) -> Norm:
        """A norm over the hidden dimension."""
        size, spec = self._spec.hidden_size, self._spec.norm
        bias = self.take(f"{stem}.bias", size) if spec.kind == "layer" else None
        return Norm(spec, self.take(f"{stem}.weight", size), bias)

    def linear(
        self, prefix: str, stems: tuple[str, ...], outs: tuple[int, ...], width: int, *, bias: bool
    ) -> Linear:
        """One projection of `width` inputs, its parts of `outs` rows stacked.

        A single stem holds all parts already merged. With `bias`, every part must have one;
        otherwise all or none.
        """
        bias = bias or any(self.has(f"{prefix}{stem}.bias") for stem in stems)
        sizes = (sum(outs),) if len(stems) == 1 else outs
        weights, biases = [], []
        for stem, out in zip(stems, sizes, strict=True):
            name = f"{prefix}{stem}"
            shape = (width, out) if self._family.transposed else (out, width)
            weight = self.take(f"{name}.weight", *shape)
            weights.append(weight.T if self._family.transposed else weight)
            if bias:
                biases.append(self.take(f"{name}.bias", out))
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return Linear(weight, torch.cat(biases) if biases else None)

    def head(self, embedding: torch.Tensor) -> torch.Tensor:
        """The output head: its own tensor, or the embedding where they are tied."""
        name = f"{self._family.head}.weight"
        if self._spec.tied_head:
            return embedding
        head = self._checkpoint.take(name, (self._spec.vocab_size, self._spec.hidden_size))
        self.num_parameters += head.numel()
        return head


class Decoder:
    """A loaded model. Building it reads and packs every weight.

    Raises:
        InvalidModel: a tensor is missing or has another shape than `config.json` implies.
    """

    def __init__(
        self,
        spec: ModelSpec,
        family: Family,
        checkpoint: Checkpoint,
        ops: OpTable,
        progress: Progress = lambda fraction, text: None,
    ) -> None:
        reader = WeightReader(checkpoint, family, spec)
        embedding = reader.take(f"{family.embed}.weight", spec.vocab_size, spec.hidden_size)
        positions = None
        if family.positions is not None:
            stem = f"{family.positions}.weight"
            positions = reader.take(stem, spec.max_positions, spec.hidden_size)
        self.spec = spec
        self._dtype, self._device = ops.to.dtype, ops.to.device
        self._embed = ops.embed(embedding, positions)
        self._attend = ops.attend(spec.attention)
        self._layers = []
        for number in range(spec.num_layers):
            self._layers.append(_read_layer(reader, family, spec, number, ops))
            progress((number + 1) / (spec.num_layers + 1), f"layer {number + 1}/{spec.num_layers}")
        self._logits = ops.logits(reader.norm(family.final_norm), reader.head(embedding))
        self.num_parameters = reader.num_parameters
        if self.num_parameters * 2 > TUNING_BYTES // 4:
            ops.tune(self._project)
        progress(1.0, "weights loaded")

    @torch.inference_mode()
    def _project(self, rows: int) -> None:
        """Run projections of some layers on made-up rows, for tuning."""
        spec = self.spec
        layer_bytes = 2 * self.num_parameters // spec.num_layers
        for layer in self._layers[: max(1, TUNING_BYTES // layer_bytes)]:
            x = torch.ones(rows, spec.hidden_size, dtype=self._dtype, device=self._device)
            mixed = layer.qkv.run(x)[:, : spec.attention.q_size].contiguous()
            layer.mlp_out.run(layer.mlp_in.run(x), layer.attention_out.run(mixed, x))

    @torch.inference_mode()
    def hidden(self, batch: StepBatch, kv: KvStorage, *, every_token: bool = False) -> torch.Tensor:
        """Run all layers over a step; writes its keys and values into `kv`.

        Returns:
            The residual stream, `[sampled, hidden]` in the order of `batch.sampled`, or
            `[tokens, hidden]` if `every_token`. Only the wanted tokens go through the last layer
            beyond its keys and values.
        """
        x = self._embed.run(batch)
        plan = self._attend.plan(batch)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            narrow = number == last and not every_token
            qkv, cache = layer.qkv.run(x), kv.layers[number]
            mixed = self._attend.run(qkv, cache, plan, sampled_only=narrow)
            if number == last:
                wanted = slice(batch.num_tokens) if every_token else batch.sampled
                mixed, x = mixed[wanted], x[wanted]
            x = layer.attention_out.run(mixed, x)
            x = layer.mlp_out.run(layer.mlp_in.run(x), x)
        return x

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden]` to fp32-or-model-dtype logits `[rows, vocab]`."""
        return self._logits.run(x)


def _read_layer(
    reader: WeightReader, family: Family, spec: ModelSpec, number: int, ops: OpTable
) -> Layer:
    prefix, names = family.layer_prefix.format(number), family.layer
    hidden, attention, mlp = spec.hidden_size, spec.attention, spec.mlp
    qkv_sizes = (attention.q_size, attention.kv_size, attention.kv_size)
    mlp_sizes = (mlp.intermediate_size,) * (2 if mlp.gated else 1)
    return Layer(
        qkv=ops.norm_linear(
            reader.norm(prefix + names.attention_norm),
            reader.linear(prefix, names.qkv, qkv_sizes, hidden, bias=spec.attention_bias),
            None,
            gated=False,
        ),
        attention_out=ops.linear_residual(
            reader.linear(
                prefix,
                (names.attention_out,),
                (hidden,),
                attention.q_size,
                bias=spec.attention_bias,
            )
        ),
        mlp_in=ops.norm_linear(
            reader.norm(prefix + names.mlp_norm),
            reader.linear(prefix, names.mlp_in, mlp_sizes, hidden, bias=spec.mlp_bias),
            mlp.activation,
            gated=mlp.gated,
        ),
        mlp_out=ops.linear_residual(
            reader.linear(
                prefix, (names.mlp_out,), (hidden,), mlp.intermediate_size, bias=spec.mlp_bias
            )
        ),
    )
