"""`LLM`: a checkpoint in this process, for scripts and batches. No server, no socket, no event loop.

Prompts are read and checked before the first one runs, and go through the same code as the server's
(`backends.llm.requests`). Not thread-safe: one call at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec

from naiad.backends.llm.builtin import path_of
from naiad.backends.llm.requests import Answer, CheckpointText, Limits, Prompt, engine_request
from naiad.core.errors import InvalidRequest, InvalidSettings
from naiad.core.generation import (
    ChatPrompt,
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    PositionLogprobs,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from naiad.engine.config import EngineConfig
from naiad.engine.messages import EngineRequest, Ready
from naiad.engine.process import EngineFactory, Progress, StepEngine

AnyPrompt = str | Sequence[int] | TextPrompt | TokensPrompt
Conversation = Sequence[Mapping[str, Any]]
Report = Callable[[int, int, int], None]
"""Called after each step with requests finished, prompt tokens read and tokens generated."""


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    """The stop token included, if one ended it."""
    logprobs: list[PositionLogprobs] | None = None
    """One per token, if asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that ended it; None for end of sequence or length."""
    cumulative_logprob: float | None = None
    """Sum over the tokens, if log probabilities were asked for."""


class RequestOutput(msgspec.Struct, kw_only=True):
    """One prompt and its answers, by index."""

    prompt: str | None
    """As given or as rendered by the chat template; None for token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    """How many of the prompt's tokens came from the prefix cache."""
    prompt_logprobs: list[PositionLogprobs | None] | None = None


class LLM:
    """A loaded checkpoint.

    ```python
    with LLM("path/to/checkpoint", max_num_seqs=32) as llm:
        for result in llm.generate(["Once upon a time", "The answer is"]):
            print(result.outputs[0].text)
    ```

    Args:
        path: The checkpoint's folder, or `builtin` for the model that comes with Naiad.
        progress: Called while loading with the fraction done and what is being done.
        make_engine: Another engine than Naiad's own.
        **settings: Fields of `EngineConfig`.

    Raises:
        InvalidSettings: an unknown setting, or one out of range.
        InvalidModel: the checkpoint cannot be loaded as it is.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        progress: Progress | None = None,
        make_engine: EngineFactory | None = None,
        **settings: Any,
    ) -> None:
        try:
            self._config = msgspec.convert({"favour": "throughput", **settings}, EngineConfig)
        except msgspec.ValidationError as error:
            raise InvalidSettings(f"engine settings: {error}") from None
        folder = path_of(path)
        self._text = CheckpointText.from_folder(folder)
        make = make_engine or _make_engine
        self._engine: StepEngine = make(folder, self._config, progress or _silent)
        self._limits = Limits(self._engine.info.vocab_size, self._engine.info.max_model_len)
        self._num_requests = 0

    @property
    def info(self) -> Ready:
        """What was loaded, and what it can hold."""
        return self._engine.info

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and caches."""
        self._engine.close()

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; results are in the order of the prompts.

        Args:
            prompts: A text or a list of token ids, or a list of these.
            sampling_params: One for all, or one per prompt; None: the model's defaults.
            use_tqdm: Show a progress bar on standard error.

        Raises:
            InvalidRequest: a prompt or parameter that cannot work; nothing has run then.
        """
        return self._run([_prompt(prompt) for prompt in _list(prompts)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them; otherwise as `generate`."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Conversation]", [messages] if one else messages)
        prompts = [
            ChatPrompt(tuple(map(dict, conversation)), add_generation_prompt)
            for conversation in conversations
        ]
        return self._run(prompts, sampling_params, use_tqdm)

    def _run(
        self,
        prompts: Sequence[TextPrompt | TokensPrompt | ChatPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        jobs = self._prepare(prompts, _per_prompt(sampling_params, len(prompts)))
        with _progress_bar(len(jobs)) if use_tqdm and jobs else _no_bar() as report:
            _Batch(self._engine, jobs, self._config).run(report)
        return [job.result() for job in jobs]

    def _prepare(
        self,
        prompts: Sequence[TextPrompt | TokensPrompt | ChatPrompt],
        sampling_params: Sequence[SamplingParams],
    ) -> list[_Job]:
        """Every prompt read and checked."""
        jobs = []
        for number, (prompt, sampling) in enumerate(zip(prompts, sampling_params, strict=True)):
            request = GenerateRequest(id=str(number), prompt=prompt, sampling=sampling)
            self._num_requests += 1
            now_ns = time.monotonic_ns()
            try:
                read = self._text.read_prompt(prompt, self._limits)
                message = engine_request(
                    request,
                    read,
                    self._text.defaults,
                    self._limits,
                    number=self._num_requests,
                    arrival_ns=now_ns,
                )
            except InvalidRequest as error:
                raise InvalidRequest(f"prompt {number}: {error}", hint=error.hint) from None
            jobs.append(_Job(request, read, message, self._text))
        return jobs


class _Job:
    """One prompt, and its answers as far as they are."""

    def __init__(
        self,
        request: GenerateRequest,
        prompt: Prompt,
        message: EngineRequest,
        text: CheckpointText,
    ) -> None:
        self.message = message
        self.num_open = request.sampling.n
        self.answers = [
            Answer(index, request, prompt, text.tokenizer, message.arrival_ns)
            for index in range(request.sampling.n)
        ]
        self._prompt = prompt
        self._deltas: list[list[GenerateDelta]] = [[] for _ in self.answers]

    def add(self, delta: GenerateDelta) -> None:
        self._deltas[delta.index].append(delta)
        self.num_open -= delta.finish_reason is not None

    def result(self) -> RequestOutput:
        summary = self._deltas[0][0].prompt
        assert summary is not None
        return RequestOutput(
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            outputs=[_completion(deltas) for deltas in self._deltas],
            num_cached_tokens=summary.num_cached_tokens,
            prompt_logprobs=None if summary.logprobs is None else list(summary.logprobs),
        )


class _Batch:
    """Runs jobs on an engine, never more in flight than its queue takes."""

    def __init__(self, engine: StepEngine, jobs: Sequence[_Job], config: EngineConfig) -> None:
        self._engine = engine
        self._to_submit = list(reversed(jobs))
        self._in_flight: dict[int, _Job] = {}
        self._num_tokens_in_flight = 0
        self._config = config
        self._num_finished = 0
        self._num_prompt_tokens = 0
        self._num_tokens = 0

    def run(self, report: Report) -> None:
        """To the end; on an error (Ctrl-C too) the engine is left without work."""
        try:
            while self._to_submit or self._in_flight:
                while self._to_submit and self._has_room():
                    job = self._to_submit.pop()
                    self._in_flight[job.message.id] = job
                    self._num_tokens_in_flight += len(job.message.prompt_token_ids)
                    self._engine.submit(job.message)
                self._step()
                report(self._num_finished, self._num_prompt_tokens, self._num_tokens)
        finally:
            for request_id in self._in_flight:
                self._engine.cancel(request_id)

    def _has_room(self) -> bool:
        """Whether the engine's queue takes the next job for certain."""
        config, num_prompt = self._config, len(self._to_submit[-1].message.prompt_token_ids)
        return not self._in_flight or (
            len(self._in_flight) < config.max_queued_requests
            and self._num_tokens_in_flight + num_prompt <= config.max_queued_tokens
        )

    def _step(self) -> None:
        outputs = self._engine.step()
        now_ns = time.monotonic_ns()
        for rejected in outputs.rejected:
            raise rejected.error.to_error()
        for output in outputs.outputs:
            job = self._in_flight.get(output.id)
            if job is None or job.answers[output.index].finish_reason is not None:
                continue  # a stop string ended it, the engine did not know yet
            answer = job.answers[output.index]
            is_first = answer.num_tokens == 0
            delta = answer.feed(output, now_ns)
            if delta is None:
                continue
            job.add(delta)
            self._num_tokens += len(delta.token_ids)
            self._num_prompt_tokens += len(job.message.prompt_token_ids) if is_first else 0
            if delta.finish_reason is not None:
                if output.finish_reason is None:
                    self._engine.cancel(output.id, output.index)
                if not job.num_open:
                    del self._in_flight[output.id]
                    self._num_tokens_in_flight -= len(job.message.prompt_token_ids)
                    self._num_finished += 1


def _completion(deltas: list[GenerateDelta]) -> CompletionOutput:
    last = deltas[-1]
    logprobs = [at for delta in deltas for at in delta.logprobs] or None
    return CompletionOutput(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cumulative_logprob=None if logprobs is None else sum(at.chosen.logprob for at in logprobs),
    )


def _list(prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[AnyPrompt]:
    """One prompt as a list of one; a list of numbers is one prompt."""
    if isinstance(prompts, str | TextPrompt | TokensPrompt):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[AnyPrompt]", prompts))


def _prompt(prompt: AnyPrompt) -> TextPrompt | TokensPrompt:
    if isinstance(prompt, TextPrompt | TokensPrompt):
        return prompt
    return TextPrompt(prompt) if isinstance(prompt, str) else TokensPrompt(tuple(prompt))


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequest(
            f"{num_prompts} prompts, but {len(params)} sampling parameters",
            hint="give one for all, or one for each prompt",
        )
    return params


def _make_engine(path: Path, config: EngineConfig, progress: Progress) -> StepEngine:
    from naiad.engine.engine import Engine  # imports torch

    return Engine(path, config, progress)


def _silent(_fraction: float, _text: str) -> None:
    """Loading that nobody watches."""


@contextlib.contextmanager
def _no_bar() -> Iterator[Report]:
    yield lambda _finished, _read, _generated: None


@contextlib.contextmanager
def _progress_bar(num_requests: int) -> Iterator[Report]:
    """A bar over requests, with the speed in tokens per second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    began = time.monotonic()
    bar = Bar(
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("", total=num_requests, speed="")

        def report(num_finished: int, num_read: int, num_generated: int) -> None:
            seconds = max(time.monotonic() - began, 1e-9)
            speed = f"in {num_read / seconds:,.0f} tok/s, out {num_generated / seconds:,.0f} tok/s"
            bar.update(task, completed=num_finished, speed=speed)

        yield report
