"""What an operator may set of an engine. One frozen struct; flags and TOML are made from it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one engine runs a checkpoint. 0 or "auto" means: chosen from the model and machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes CUDA if there is one."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and activations; auto is the checkpoint's."""

    max_model_len: Annotated[int, Meta(ge=0)] = 0
    """Most tokens of prompt and answer together. 0: the checkpoint's limit, shrunk to the KV cache."""

    max_num_seqs: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Most sequences in one step. 0: 64 on CPU, 256 on CUDA."""

    favour: Literal["latency", "throughput"] = "latency"
    """What a step's size favours: even gaps between tokens of those who wait for them, or tokens of all
    together. `naiad.LLM` favours throughput."""

    max_num_batched_tokens: Annotated[int, Meta(ge=0)] = 0
    """Token budget of one step, decode rows first, the rest for prefill chunks. 0: on CPU 1024, or
    2048 for throughput; on CUDA 8192, or 16384."""

    max_queued_requests: PositiveInt = 2048
    """Requests that may wait; one more is refused with 429."""

    max_queued_tokens: PositiveInt = 8_388_608
    """Prompt tokens of the requests that may wait, together; more are refused with 429. A token takes
    about 40 bytes."""

    kv_layout: Literal["auto", "pages", "slots"] = "auto"
    """How keys and values are kept; auto is slots (contiguous) on CPU and pages on CUDA."""

    kv_page_tokens: Annotated[int, Meta(ge=1, le=1024)] = 64
    """Tokens of one page, and of one link of the prefix cache's hash chain."""

    kv_cache_tokens: Annotated[int, Meta(ge=0)] = 0
    """Tokens that the KV cache holds. 0: as many as `kv_memory_fraction` of free memory takes, at most
    `max_num_seqs` x `max_model_len`."""

    kv_memory_fraction: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.4
    """Share of the memory free after loading the weights that the KV cache may take."""

    prefix_cache: bool = True
    """Reuse keys and values of prompts that begin alike."""

    ops: Literal["auto", "reference", "cpu"] = "auto"
    """Which operation bodies to prefer; reference is plain torch, the specification."""

    num_threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of the engine. 0: one for each core that this process may use, or a single one for a
    checkpoint below 64 MiB. With busy neighbours on the same cores, fewer threads are faster: every
    operation waits for the last of them."""
