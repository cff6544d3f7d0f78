"""Every message between an engine process and its clients, and the outputs of one engine step.

Frozen msgspec structs, sent as msgpack behind a 4-byte little-endian length over a Unix socket. The
in-process engine uses the same `EngineRequest` and `StepOutputs` without the socket. Texts do not
appear here: the engine speaks token ids, the client tokenizes.
"""

from __future__ import annotations

import msgspec

from naiad.core.errors import WireError
from naiad.engine.config import EngineConfig


class EngineSampling(msgspec.Struct, frozen=True, kw_only=True):
    """`core.generation.SamplingParams` with every default resolved, numbers only."""

    n: int = 1
    max_tokens: int
    """Already clipped to the context: prompt + max_tokens <= max_model_len."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int
    """Always set, 64 bits unsigned; answer i of `n` uses seed + i."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end an answer, end of sequence included unless ignored."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """Client -> engine: continue these tokens. `id` is chosen by the client, unique while alive."""

    id: int
    prompt_token_ids: list[int]
    sampling: EngineSampling
    priority: int = 0
    """Lower runs first, -100 to 100."""
    arrival_ns: int
    """`time.monotonic_ns` of the client; one host, one clock."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Client -> engine: forget request `id` within one step. Unknown ids are ignored."""

    id: int
    index: int = -1
    """Forget only this answer (a stop string ended it); -1: all of them."""


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """Client -> engine, first message: load this and start."""

    path: str
    config: EngineConfig


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the unmodified distribution (fp32, natural)."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for answer `index` of request `id`."""

    id: int
    index: int
    token_ids: list[int]
    """Newly committed tokens, the stop token included."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """A `core.generation.FinishReason` value."""
    stop_token_id: int | None = None
    prompt_cached_tokens: int = 0
    """Only meaningful with the answer's first tokens."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token, the first None; only with the first tokens of answer 0."""
    first_scheduled_ns: int = 0
    """Set with the first and with the last tokens, as is `first_token_ns`: a stop string, which only
    the client sees, may end the answer at any of them."""
    first_token_ns: int = 0


class Rejected(msgspec.Struct, frozen=True, array_like=True):
    """Request `id` was refused or failed; nothing more will come for it."""

    id: int
    error: WireError


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State after a step, and counters since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Share of the KV cache held by live requests, 0 to 1."""
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_queries_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_step_tokens: int = 0
    """Tokens computed in the last step."""


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Engine -> client: everything one step produced, in one message."""

    outputs: list[SequenceOutput] = []
    rejected: list[Rejected] = []
    stats: EngineStats


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Engine -> client: progress of loading, 0 to 1, and what is being done."""

    fraction: float
    text: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Engine -> client: loaded; requests are served from now on."""

    architecture: str
    dtype: str
    device: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    """What this engine can hold: the checkpoint's, the configured, or the KV cache's limit."""
    kv_capacity_tokens: int
    max_num_seqs: int
    memory: list[tuple[str, int]] = []
    """Memory budget: what for, bytes."""


class Died(msgspec.Struct, frozen=True, tag="died"):
    """Engine -> client: it cannot go on (bad checkpoint, out of memory); the process exits."""

    error: WireError


ToEngine = Configure | EngineRequest | Cancel
FromEngine = Loading | Ready | StepOutputs | Died
