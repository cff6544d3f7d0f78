"""What a decoder is made of, as plain values: the only description that ops and decoder see.

A `ModelSpec` is made from a checkpoint's `config.json` by its family (`engine.families`). Adding an
architecture that differs only in these values needs no new model code.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class NormSpec(msgspec.Struct, frozen=True):
    """Normalisation over the hidden dimension, computed in fp32."""

    kind: Literal["rms", "layer"]
    eps: float


class RopeSpec(msgspec.Struct, frozen=True):
    """Rotary position embedding, halves rotated against each other (NeoX order)."""

    theta: float


class AttentionSpec(msgspec.Struct, frozen=True):
    """Causal self-attention with grouped heads: `num_heads` is a multiple of `num_kv_heads`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None = None

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the merged projection: queries, keys, values."""
        return self.q_size + 2 * self.kv_size


class MlpSpec(msgspec.Struct, frozen=True):
    """Feed-forward block: `down(act(gate) * up)` if gated, else `down(act(up))`."""

    intermediate_size: int
    activation: Activation
    gated: bool


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A pre-norm decoder: embed, layers of attention and feed-forward, final norm, head."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    attention_bias: bool = False
    """Attention projections must have biases; ones that the checkpoint has anyway are used too."""
    mlp_bias: bool = False
    """As `attention_bias`, for the feed-forward block."""
    learned_positions: bool = False
    tied_head: bool = False
    dtype: str = "float32"
    """The checkpoint's own type, as `config.json` names it."""

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.num_layers * self.attention.kv_size * element_bytes
