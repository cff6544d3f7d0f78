"""From a checkpoint folder and an `EngineConfig` to a runner, a cache manager and what they came to.

Owns resolving every "auto" and 0 of the configuration against the model and the machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from naiad.core.errors import InvalidSettings, Unavailable
from naiad.engine import memory
from naiad.engine.checkpoint import Checkpoint, read_config
from naiad.engine.config import EngineConfig
from naiad.engine.decoder import Decoder, Progress
from naiad.engine.families import family_of
from naiad.engine.kv.base import KvManager
from naiad.engine.kv.pages import PageManager
from naiad.engine.kv.slots import SlotManager
from naiad.engine.kv.storage import KvStorage, SlotStorage
from naiad.engine.messages import Ready
from naiad.engine.ops.base import Target
from naiad.engine.ops.table import OpTable
from naiad.engine.runner import Runner
from naiad.engine.scheduler.base import SchedulerConfig
from naiad.engine.spec import ModelSpec

_MAX_SEQS = {"cpu": 64, "cuda": 256}
_STEP_TOKENS = {
    ("cpu", "latency"): 1024,
    ("cpu", "throughput"): 2048,
    ("cuda", "latency"): 8192,
    ("cuda", "throughput"): 16384,
}
_STEP_BYTES = 512 << 20  # of heap for the buffers of a step on CPU; address space, not memory
_SMALL_BYTES = 64 << 20
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(slots=True)
class Loaded:
    """Everything an engine is made of."""

    runner: Runner
    kv: KvManager
    block_tokens: int
    device: torch.device
    vocab_size: int
    limits: SchedulerConfig
    info: Ready


def load(path: Path, config: EngineConfig, progress: Progress) -> Loaded:
    """Read the checkpoint, pack its weights, size and reserve the cache.

    Raises:
        InvalidModel: the checkpoint cannot be run; the message names file and tensor.
        InvalidSettings: the configuration does not fit the model or the machine.
    """
    raw = read_config(path)
    family = family_of(raw)
    spec = family.spec(raw)
    device = _device(config)
    dtype = _dtype(config, spec, device)
    checkpoint = Checkpoint(path)
    if device.type == "cpu":
        memory.prepare_heap(checkpoint.total_bytes() + _STEP_BYTES)
        torch.set_num_threads(config.num_threads or _num_threads(checkpoint))
    max_len = _max_model_len(config, spec)
    layout = _layout(config, device)
    max_seqs = config.max_num_seqs or _MAX_SEQS[device.type]
    block_tokens = max_len if layout == "slots" else config.kv_page_tokens
    before = memory.free_bytes(device)
    target = Target(device, dtype, block_tokens, max_len)
    decoder = Decoder(spec, family, checkpoint, OpTable(config.ops, target), progress)
    if device.type == "cpu":
        memory.use_huge_pages()
    most, free = max_seqs * max_len, memory.free_bytes(device)
    tokens = memory.cache_tokens(
        config, spec, max_tokens=most, element_bytes=dtype.itemsize, free=free
    )
    kv, num_blocks = _manager(config, layout, max_seqs, max_len, tokens)
    max_len = min(max_len, kv.max_tokens_per_sequence())
    storage: KvStorage
    if layout == "slots":
        storage = SlotStorage(spec, num_blocks, dtype=dtype, device=device)
    else:
        storage = KvStorage(spec, num_blocks, block_tokens, dtype=dtype, device=device)
    limits = _limits(config, device, max_seqs, max_len)
    info = Ready(
        architecture=spec.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=_describe(device),
        num_parameters=decoder.num_parameters,
        vocab_size=spec.vocab_size,
        max_model_len=max_len,
        kv_capacity_tokens=kv.capacity_tokens,
        max_num_seqs=max_seqs,
        memory=_budget(
            before,
            decoder.num_parameters * dtype.itemsize,
            f"KV cache, {kv.capacity_tokens} tokens as {layout}",
            kv.capacity_tokens * spec.kv_bytes_per_token(dtype.itemsize),
        ),
    )
    runner = Runner(decoder, storage)
    return Loaded(runner, kv, block_tokens, device, spec.vocab_size, limits, info)


def _limits(
    config: EngineConfig, device: torch.device, max_seqs: int, max_len: int
) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=max_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens
        or _STEP_TOKENS[device.type, config.favour],
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        max_model_len=max_len,
    )


def _budget(free: int, weights: int, kv_text: str, kv: int) -> list[tuple[str, int]]:
    """Rows of the memory table, in bytes."""
    left = max(free - weights - kv, 0)
    return [("free before loading", free), ("weights", weights), (kv_text, kv), ("left", left)]


def _manager(
    config: EngineConfig, layout: str, max_seqs: int, max_len: int, tokens: int
) -> tuple[KvManager, int]:
    """The cache manager of a layout, and how many blocks its storage needs."""
    page = config.kv_page_tokens
    if layout == "slots":
        slots = SlotManager(max_seqs, max_len, tokens, page, prefix_cache=config.prefix_cache)
        return slots, max_seqs
    num_pages = max(tokens // page, 1)
    return PageManager(num_pages, page, prefix_cache=config.prefix_cache), num_pages


def _layout(config: EngineConfig, device: torch.device) -> str:
    if config.kv_layout != "auto":
        return config.kv_layout
    return "slots" if device.type == "cpu" else "pages"


def _num_threads(checkpoint: Checkpoint) -> int:
    """A small model gains little from a second thread and waits for it on a busy machine."""
    if checkpoint.total_bytes() < _SMALL_BYTES:
        return 1
    return len(os.sched_getaffinity(0))


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable(
            "device cuda was asked for, but this machine has no CUDA device that torch can use",
            hint="use --device cpu, or install a torch build with CUDA",
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def _dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    name = spec.dtype if config.dtype == "auto" else config.dtype
    if name not in _DTYPES:
        raise InvalidSettings(
            f"the checkpoint's dtype is {name!r}; implemented: {', '.join(_DTYPES)}",
            hint="choose one with --dtype",
        )
    if config.dtype == "auto" and name == "float16" and device.type == "cpu":
        name = "bfloat16"  # CPUs multiply bf16 fast and fp16 slowly
    return _DTYPES[name]


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_model_len > spec.max_positions:
        raise InvalidSettings(
            f"max_model_len {config.max_model_len} exceeds the checkpoint's {spec.max_positions} "
            "positions",
            hint=f"use --max-model-len {spec.max_positions} or less",
        )
    return config.max_model_len or spec.max_positions


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
