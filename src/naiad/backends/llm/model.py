"""A checkpoint served by an engine process, as a `LanguageModel`.

Joins text (`requests`) and the process (`client`) and measures (`metrics`). A step's outputs are
turned into deltas as they arrive, so stop strings end an answer at once whether or not anyone is
reading; a reader who is slower than the engine gets several steps in one delta.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from naiad.backends.llm.builtin import path_of
from naiad.backends.llm.client import DEFAULT_SUPERVISION, EngineClient, Supervision
from naiad.backends.llm.link import Progress
from naiad.backends.llm.metrics import EngineMetrics
from naiad.backends.llm.requests import (
    Answer,
    CheckpointText,
    Limits,
    Prompt,
    coalesce,
    engine_request,
    is_long,
)
from naiad.core.errors import NaiadError
from naiad.core.generation import GenerateDelta, GenerateRequest
from naiad.core.language import LanguageModel
from naiad.core.model import ModelMetadata
from naiad.core.text_fields import text_metadata
from naiad.engine.config import EngineConfig
from naiad.engine.messages import SequenceOutput

MAX_INLINE_CHARS = 4096
"""Longer prompts are tokenized in a thread (the library releases the GIL): this much takes 1-2 ms."""
_COALESCE_AT = 64
"""Deltas beyond one per answer that wait for a slow reader before they are joined."""


class EngineLanguageModel(LanguageModel):
    """A started engine and the text around it; `load_language_model` makes one."""

    def __init__(
        self,
        metadata: ModelMetadata,
        text: CheckpointText,
        client: EngineClient,
        metrics: EngineMetrics,
    ) -> None:
        self._metadata = metadata
        self._text = text
        self._client = client
        self._metrics = metrics
        self._created_s = int(time.time())
        self._limits = Limits(client.info.vocab_size, client.info.max_model_len)

    @property
    def metadata(self) -> ModelMetadata:
        """A text model's tensors."""
        return self._metadata

    @property
    def max_model_len(self) -> int:
        """What the engine can hold of one prompt and answer."""
        return self._limits.max_model_len

    @property
    def created_s(self) -> int:
        """When the model was loaded, Unix seconds."""
        return self._created_s

    @property
    def client(self) -> EngineClient:
        """The engine's process: its state, statistics and what it said when it was ready."""
        return self._client

    def is_ready(self) -> bool:
        """Up, and reporting steps if it has work."""
        return self._client.is_ready()

    async def close(self) -> None:
        """End the engine's process."""
        await self._client.close()

    def extra_metrics(self) -> list[Any]:
        """The `vllm:*` families of this model."""
        return list(self._metrics.families(self._client.stats, self._client.num_restarts))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        """See `LanguageModel.generate`."""
        arrival_ns = time.monotonic_ns()
        prompt = await self._read_prompt(request)
        message = engine_request(
            request,
            prompt,
            self._text.defaults,
            self._limits,
            number=self._client.new_id(),
            arrival_ns=arrival_ns,
        )
        stream = _Stream(self, message.id, request, prompt, arrival_ns)
        self._metrics.accepted(message)
        try:
            await self._client.open(message, stream)
            while stream.num_open or stream.pending:
                for delta in await stream.take():
                    yield delta
        except NaiadError:
            self._metrics.ended_early(stream.num_open, "error")
            stream.num_open = 0
            raise
        finally:
            if stream.num_open:
                self._metrics.ended_early(stream.num_open, "abort")
                self._client.close_request(message.id, ended=False)

    async def _read_prompt(self, request: GenerateRequest) -> Prompt:
        if not is_long(request.prompt, MAX_INLINE_CHARS):
            return self._text.read_prompt(request.prompt, self._limits)
        return await asyncio.to_thread(self._text.read_prompt, request.prompt, self._limits)


class _Stream:
    """What the engine produced for one request and nobody has taken yet."""

    __slots__ = (
        "_answers",
        "_arrival_ns",
        "_client",
        "_error",
        "_id",
        "_last_ns",
        "_max_pending",
        "_metrics",
        "_observe_gap",
        "_waiter",
        "num_open",
        "pending",
    )

    def __init__(
        self,
        model: EngineLanguageModel,
        number: int,
        request: GenerateRequest,
        prompt: Prompt,
        arrival_ns: int,
    ) -> None:
        self._client = model._client
        self._metrics = model._metrics
        self._id = number
        self._answers = [
            Answer(index, request, prompt, model._text.tokenizer, arrival_ns)
            for index in range(request.sampling.n)
        ]
        self.num_open = len(self._answers)
        self._arrival_ns = arrival_ns
        self._last_ns = [0] * len(self._answers)
        self._observe_gap = self._metrics.inter_token.observe
        self._max_pending = len(self._answers) + _COALESCE_AT
        self.pending: list[GenerateDelta] = []
        self._error: NaiadError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[GenerateDelta]:
        """Everything since the last call, at most one delta per answer; waits for at least one.

        Raises:
            NaiadError: the request was refused or failed, after everything that came before.
        """
        while not self.pending:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self.pending = self.pending, []
        return taken if len(taken) == 1 else coalesce(taken)

    def feed(self, output: SequenceOutput, now_ns: int) -> None:
        """See `client.Sink`: the hot path, once per answer and step."""
        answer = self._answers[output.index]
        if answer.finish_reason is not None:
            return  # a stop string ended it, the engine did not know yet
        delta = answer.feed(output, now_ns)
        if delta is None:
            return
        self.pending.append(delta)
        last_ns, self._last_ns[output.index] = self._last_ns[output.index], now_ns
        if last_ns:
            self._observe_gap((now_ns - last_ns) * 1e-9)
        else:
            self._metrics.first_token((now_ns - self._arrival_ns) * 1e-9)
        if delta.finish_reason is not None:
            self._end_answer(output, delta)
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None
        elif len(self.pending) > self._max_pending:
            self.pending = coalesce(self.pending)

    def fail(self, error: NaiadError) -> None:
        """See `client.Sink`."""
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end_answer(self, output: SequenceOutput, delta: GenerateDelta) -> None:
        self.num_open -= 1
        self._metrics.finished(delta, self._answers[output.index].num_tokens)
        if not self.num_open:
            # Not left to the reader: a stop string frees the engine now, whoever reads when.
            self._client.close_request(self._id, ended=output.finish_reason is not None)
        elif output.finish_reason is None:
            self._client.cancel_answer(self._id, output.index)


async def load_language_model(
    path: str | Path,
    config: EngineConfig,
    served_names: Sequence[str] = (),
    progress: Progress | None = None,
    *,
    supervision: Supervision = DEFAULT_SUPERVISION,
    command: Sequence[str] | None = None,
) -> EngineLanguageModel:
    """Read a checkpoint's text files, start an engine process on it and wait until it is ready.

    Call it from the main thread: the engine dies with the thread that started it.

    Args:
        path: The checkpoint's folder, or `builtin`; the model answers to it as given, and to its name.
        config: How the engine runs it.
        served_names: Names it answers to first; the first is the model's name.
        progress: Called with the fraction loaded and what is being done.
        supervision: Time-outs and restarts.
        command: Starts the engine process, if not the usual one.

    Raises:
        InvalidModel: the checkpoint cannot be loaded as it is.
        Unavailable: the engine process died while loading.
    """
    folder = path_of(path)
    text = await asyncio.to_thread(CheckpointText.from_folder, folder)
    names = _names(path, served_names)
    metadata = text_metadata(names[0], platform="naiad_engine", aliases=tuple(names[1:]))
    metrics = EngineMetrics(names[0])
    options: dict[str, Any] = {} if command is None else {"command": command}
    client = EngineClient(
        folder,
        config,
        supervision=supervision,
        progress=progress,
        on_step=metrics.stepped,
        **options,
    )
    metrics.loaded(await client.start(), config)
    return EngineLanguageModel(metadata, text, client, metrics)


def _names(path: str | Path, served_names: Sequence[str]) -> list[str]:
    """Names of the model, the first its own, without repetition."""
    return list(dict.fromkeys([*served_names, Path(path).resolve().name, str(path)]))
