"""An engine that recites its prompt, for tests of everything around an engine. No torch.

Answer `i` of a prompt is its tokens over and over, starting at token `i`. What it should do wrong is
in `fake_engine.json` of the checkpoint's folder (`Faults`). Run as a script it is an engine process.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from naiad.core.errors import InvalidModel, QueueFull, WireError
from naiad.engine import process
from naiad.engine.config import EngineConfig
from naiad.engine.messages import (
    EngineRequest,
    EngineStats,
    Ready,
    Rejected,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
)

COMMAND = (sys.executable, "-P", __file__)


class Faults(msgspec.Struct, forbid_unknown_fields=True):
    """What goes wrong; a token triggers its fault when a prompt that contains it is stepped."""

    load_error: str = ""
    exit_while_loading: bool = False
    exit_unless: str = ""
    """Exit while loading until a file of this name exists."""
    step_s: float = 0.0
    raise_token: int = -1
    exit_token: int = -1
    hang_token: int = -1
    max_num_seqs: int = 64


class FakeSequence:
    def __init__(self, request: EngineRequest, index: int) -> None:
        self.request = request
        self.index = index
        self.num_tokens = 0
        self.scheduled_ns = 0
        self.first_token_ns = 0

    def step(self) -> SequenceOutput:
        now_ns = time.monotonic_ns()
        request, sampling = self.request, self.request.sampling
        prompt = request.prompt_token_ids
        token = prompt[(self.index + self.num_tokens) % len(prompt)]
        is_first = self.num_tokens == 0
        self.num_tokens += 1
        if is_first:
            self.scheduled_ns = self.first_token_ns = now_ns
        reason = "length" if self.num_tokens >= sampling.max_tokens else None
        stop = token if token in sampling.stop_token_ids else None
        if stop is not None and self.num_tokens > sampling.min_tokens:
            reason = "stop"
        else:
            stop = None
        stamped = is_first or reason is not None
        return SequenceOutput(
            id=request.id,
            index=self.index,
            token_ids=[token],
            logprobs=None if sampling.logprobs is None else [fake_logprobs(token)],
            finish_reason=reason,
            stop_token_id=stop,
            prompt_cached_tokens=1,
            prompt_logprobs=None
            if sampling.prompt_logprobs is None or not is_first or self.index > 0
            else [None, *map(fake_logprobs, prompt[1:])],
            first_scheduled_ns=self.scheduled_ns if stamped else 0,
            first_token_ns=self.first_token_ns if stamped else 0,
        )


def fake_logprobs(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, [token, token + 1], [-0.5, -1.5])


class FakeEngine:
    def __init__(
        self, path: Path, config: EngineConfig, progress: Callable[[float, str], None]
    ) -> None:
        file = path / "fake_engine.json"
        data = file.read_bytes() if file.is_file() else b"{}"
        self.faults = msgspec.json.decode(data, type=Faults)
        progress(0.5, "half")
        if self.faults.load_error:
            raise InvalidModel(self.faults.load_error, hint="use another")
        if self.faults.exit_while_loading:
            os._exit(3)
        if self.faults.exit_unless and not (path / self.faults.exit_unless).exists():
            os._exit(3)
        self._limit = config.max_queued_requests
        self.running: list[FakeSequence] = []
        self.waiting: deque[FakeSequence] = deque()
        self.rejected: list[Rejected] = []
        self.stats = EngineStats()
        self.closed = False
        self.info = Ready(
            architecture="Fake",
            dtype="float32",
            device="cpu",
            num_parameters=0,
            vocab_size=512,
            max_model_len=config.max_model_len or 4096,
            kv_capacity_tokens=65536,
            max_num_seqs=config.max_num_seqs or self.faults.max_num_seqs,
        )

    def submit(self, request: EngineRequest) -> None:
        if len({sequence.request.id for sequence in self.waiting}) >= self._limit:
            error = QueueFull("queue full", limit=self._limit, retry_after_s=1)
            self.rejected.append(Rejected(request.id, WireError.of(error)))
            return
        self.waiting.extend(FakeSequence(request, i) for i in range(request.sampling.n))

    def cancel(self, request_id: int, index: int = -1) -> None:
        def stays(sequence: FakeSequence) -> bool:
            return sequence.request.id != request_id or index not in (-1, sequence.index)

        self.running = list(filter(stays, self.running))
        self.waiting = deque(filter(stays, self.waiting))

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.rejected)

    def step(self) -> StepOutputs:
        self._misbehave()
        while self.waiting and len(self.running) < self.info.max_num_seqs:
            self.running.append(self.waiting.popleft())
        stepped, self.running = self.running, []
        outputs = [sequence.step() for sequence in stepped]
        for sequence, output in zip(stepped, outputs, strict=True):
            if output.finish_reason is None:
                self.running.append(sequence)
        num_prompt = sum(len(s.request.prompt_token_ids) for s in stepped if s.num_tokens == 1)
        rejected, self.rejected = self.rejected, []
        self.stats = EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_steps=self.stats.num_steps + 1,
            num_prompt_tokens=self.stats.num_prompt_tokens + num_prompt,
            num_generated_tokens=self.stats.num_generated_tokens + len(outputs),
            num_step_tokens=len(outputs) + num_prompt,
        )
        return StepOutputs(outputs=outputs, rejected=rejected, stats=self.stats)

    def _misbehave(self) -> None:
        faults = self.faults
        if faults.step_s and self.has_work():
            time.sleep(faults.step_s)  # what a real step would take
        seen = {t for s in [*self.running, *self.waiting] for t in s.request.prompt_token_ids}
        if faults.exit_token in seen:
            os._exit(4)
        if faults.raise_token in seen:
            raise RuntimeError("a bad step")
        while faults.hang_token in seen:
            time.sleep(3600)

    def close(self) -> None:
        self.closed = True


if __name__ == "__main__":
    process.main(sys.argv[1:], FakeEngine)
