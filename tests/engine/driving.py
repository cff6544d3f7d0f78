"""An engine on a tiny random checkpoint, and requests driven through it step by step.

Shared by the golden cases (`golden`) and the tests of the engine. Needs no pytest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from naiad.core.clock import Clock, SystemClock
from naiad.engine.config import EngineConfig
from naiad.engine.engine import Engine
from naiad.engine.messages import (
    EngineRequest,
    EngineSampling,
    EngineStats,
    SequenceOutput,
    StepOutputs,
)
from tools.make_tiny_checkpoint import write_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "llama-gqa": {"family": "llama", "num_heads": 4, "num_kv_heads": 2},
    "llama-mqa-wide-heads": {"family": "llama", "num_kv_heads": 1, "head_dim": 32, "num_shards": 2},
    "llama-mha-tied-biased": {
        "family": "llama",
        "num_kv_heads": 4,
        "tied": True,
        "attention_bias": True,
        "rope_theta": 500_000.0,
    },
    "gpt2": {"family": "gpt2"},
    "gpt2-bare-names": {"family": "gpt2", "bare_names": True, "num_layers": 3, "seed": 1},
}
"""Options of `tools.make_tiny_checkpoint` by name."""

PAGE_TOKENS = 16
MAX_LEN = 128


@dataclass(frozen=True)
class Setup:
    """How the engine side runs."""

    device: str = "cpu"
    dtype: str = "float32"
    ops: str = "reference"
    layout: str = "pages"

    def __str__(self) -> str:
        return f"{self.device}-{self.dtype}-{self.ops}-{self.layout}"


@cache
def checkpoint(shape: str, dtype: str = "float32") -> Path:
    """The folder of a shape's checkpoint, written once; kept until the process ends."""
    root = Path(_folder().name, f"{shape}-{dtype}")
    return write_checkpoint(root, dtype=dtype, **SHAPES[shape])


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="naiad-golden-")


def tokens_of(seed: int, length: int) -> list[int]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(5, 512, (length,), generator=generator).tolist()
    return ids


def greedy(**options: Any) -> EngineSampling:
    """Greedy sampling that ends only at `max_tokens`."""
    return EngineSampling(**({"temperature": 0.0, "seed": 0} | options))


def request(number: int, prompt: Sequence[int], sampling: EngineSampling) -> EngineRequest:
    """A request that has just arrived."""
    return EngineRequest(id=number, prompt_token_ids=list(prompt), sampling=sampling, arrival_ns=0)


@dataclass
class Answers:
    """What an engine said to some requests."""

    tokens: dict[tuple[int, int], list[int]]
    """By request id and index of the answer."""
    outputs: list[SequenceOutput]
    stats: EngineStats
    num_mixed_steps: int
    """Steps that both went on with an answer and read prompt tokens."""


def drive(engine: Engine, requests: Sequence[tuple[int, EngineRequest]]) -> Answers:
    """Submit each request before the step it comes with, and run until all are answered."""
    waiting = sorted(requests, key=lambda pair: pair[0])
    answers = Answers({}, [], engine.stats(), 0)
    num_steps = 0
    while waiting or engine.has_work():
        while waiting and (waiting[0][0] <= num_steps or not engine.has_work()):
            engine.submit(waiting.pop(0)[1])
        step = engine.step()
        assert not step.rejected, step.rejected
        num_steps += 1
        going_on = [out for out in step.outputs if (out.id, out.index) in answers.tokens]
        if going_on and step.stats.num_step_tokens > len(step.outputs):
            answers.num_mixed_steps += 1
        for out in step.outputs:
            answers.tokens.setdefault((out.id, out.index), []).extend(out.token_ids)
        answers.outputs += step.outputs
        answers.stats = step.stats
        engine.check()
    return answers


def make_engine(
    shape: str,
    setup: Setup,
    *,
    clock: Clock = SystemClock(),  # noqa: B008 - it has no state
    **options: Any,
) -> Engine:
    """An engine on the shape's checkpoint; small pages and no "auto"."""
    defaults: dict[str, Any] = {
        "device": setup.device,
        "dtype": setup.dtype,
        "ops": setup.ops,
        "kv_layout": setup.layout,
        "kv_page_tokens": PAGE_TOKENS,
        "kv_cache_tokens": 1024,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 8,
        "num_threads": torch.get_num_threads(),
    }
    config = EngineConfig(**(defaults | options))
    return Engine(checkpoint(shape, setup.dtype), config, clock=clock)


def first_outputs(answers: Answers) -> dict[tuple[int, int], SequenceOutput]:
    found: dict[tuple[int, int], SequenceOutput] = {}
    for output in answers.outputs:
        found.setdefault((output.id, output.index), output)
    return found


def last_outputs(answers: Answers) -> dict[tuple[int, int], SequenceOutput]:
    return {(output.id, output.index): output for output in answers.outputs}


def run_out(engine: Engine) -> list[StepOutputs]:
    steps = []
    while engine.has_work():
        steps.append(engine.step())
        engine.check()
    return steps


def is_empty(engine: Engine) -> bool:
    """Whether nothing is kept of any request."""
    stats = engine.stats()
    return (
        stats.num_running == stats.num_waiting == stats.kv_usage == 0
        and engine._kv.used_tokens == 0
        and not engine._prompt_logprobs
        and not engine._rejected
        and not engine._scheduler._requests
        and not engine._scheduler._held
    )
