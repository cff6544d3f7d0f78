"""A language model that recites: the answers are a list of token texts, known beforehand.

It keeps the whole contract of `LanguageModel.generate` (n, limits, stops, log probabilities,
priorities, a bounded queue, cancellation) without torch, a tokenizer or a device, so protocols can
be tested and demonstrated against it. Whatever the temperature, it says the same: it samples nothing.

A prompt counts one token per word. An answer recites the script once and then ends as a model does
at its end of sequence; with `ignore_eos` or `min_tokens` it starts over.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import msgspec

from naiad.core.errors import InvalidRequest, QueueFull, Unavailable
from naiad.core.generation import (
    ChatPrompt,
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    GenerateTiming,
    PositionLogprobs,
    PromptSummary,
    SamplingParams,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
)
from naiad.core.language import LanguageModel
from naiad.core.model import ModelMetadata
from naiad.core.text_fields import text_metadata

Hook = Callable[[GenerateRequest, int], Awaitable[None]]
"""Awaited before the token at a position (from 0) of every answer; may wait, or raise to fail."""

_WORDS = re.compile(r"\S+")
_VOCABULARY_SIZE = 65_536


def wait_at(position: int, event: asyncio.Event) -> Hook:
    """A hook that holds every answer before its token `position` until `event` is set."""

    async def hook(_request: GenerateRequest, at: int) -> None:
        if at == position:
            await event.wait()

    return hook


def fail_at(position: int, error: Exception) -> Hook:
    """A hook that ends every request with `error` instead of its token `position`."""

    async def hook(_request: GenerateRequest, at: int) -> None:
        if at == position:
            raise error

    return hook


class ScriptedLanguageModel(LanguageModel):
    """Recites `script`, at most `max_running` requests at a time.

    Args:
        script: Token texts of every answer, in order; not empty.
        name: The model's name.
        aliases: Other names it answers to.
        max_model_len: Most tokens of prompt and answer together.
        max_running: Requests that recite at the same time.
        max_waiting: Requests that may wait for one of those places; the next gets `QueueFull`.
        before_token: See `Hook`.
    """

    def __init__(
        self,
        script: Sequence[str],
        *,
        name: str = "scripted",
        aliases: Iterable[str] = (),
        max_model_len: int = 4096,
        max_running: int = 256,
        max_waiting: int = 1024,
        before_token: Hook | None = None,
    ) -> None:
        self._script = tuple(script)
        self._vocabulary = {text: number for number, text in enumerate(dict.fromkeys(script))}
        self._metadata = text_metadata(name, platform="scripted", aliases=tuple(aliases))
        self._max_model_len = max_model_len
        self._created_s = int(time.time())
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._observers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.before_token = before_token
        self.closed = False
        self.num_running = 0
        self.num_finished = 0
        self.num_cancelled = 0
        self.requests: list[GenerateRequest] = []
        """Every request that was accepted, in order of arrival."""

    @property
    def metadata(self) -> ModelMetadata:
        """A text model's tensors."""
        return self._metadata

    @property
    def max_model_len(self) -> int:
        """As given."""
        return self._max_model_len

    @property
    def created_s(self) -> int:
        """When the object was made."""
        return self._created_s

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return sum(not place.done() for _, _, place in self._waiting)

    def is_ready(self) -> bool:
        """Until closed."""
        return not self.closed

    async def close(self) -> None:
        """Refuse everything from now on; running answers end with `Unavailable`."""
        self.closed = True
        for _, _, place in self._waiting:
            if not place.done():
                place.set_exception(Unavailable("the model was closed", retry_after_s=1))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition()` holds; asked again whenever one of the counts changes."""
        if not condition():
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._observers.append((condition, changed))
            await changed

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        """See `LanguageModel.generate`."""
        arrival_ns = time.monotonic_ns()
        summary = self._read(request)
        self.requests.append(request)
        try:
            await self._enter(request.priority)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self._changed()
            raise
        scheduled_ns = time.monotonic_ns()
        completed = False
        try:
            others = msgspec.structs.replace(summary, logprobs=None)
            answers = [
                _Answer(index, self._script, self._vocabulary, request.sampling, prompt)
                for index, prompt in enumerate([summary] + [others] * (request.sampling.n - 1))
            ]
            room = self._max_model_len - summary.num_tokens
            position = 0
            while unfinished := [answer for answer in answers if not answer.finished]:
                if self.before_token is not None:
                    await self.before_token(request, position)
                await asyncio.sleep(0)  # one step: let every other answer take its own
                if self.closed:
                    raise Unavailable("the model was closed", retry_after_s=1)
                for answer in unfinished:
                    yield answer.step(room, arrival_ns, scheduled_ns)
                position += 1
            completed = True
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_finished += completed
            self._leave()

    def _read(self, request: GenerateRequest) -> PromptSummary:
        match request.prompt:
            case TextPrompt(text):
                pass
            case TokensPrompt(token_ids):
                if unknown := [i for i in token_ids if not 0 <= i < _VOCABULARY_SIZE]:
                    raise InvalidRequest(
                        f"token id {unknown[0]} is outside the vocabulary of {_VOCABULARY_SIZE}"
                    )
                text = " ".join(str(token_id) for token_id in token_ids)
            case ChatPrompt(messages):
                text = "".join(f"{m.get('role')}: {m.get('content')}\n" for m in messages)
        words = _WORDS.findall(text)
        if not words:
            raise InvalidRequest("the prompt is empty", hint="send at least one token")
        if len(words) >= self._max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(words)} tokens, the model takes at most "
                f"{self._max_model_len} of prompt and answer together",
                hint="shorten the prompt",
            )
        wanted = request.sampling.prompt_logprobs
        logprobs = None
        if wanted is not None:
            read = tuple(_logprobs(number, word, wanted, {}) for number, word in enumerate(words))
            logprobs = (None, *read[1:])
        return PromptSummary(
            num_tokens=len(words), num_cached_tokens=0, text=text, logprobs=logprobs
        )

    async def _enter(self, priority: int) -> None:
        if self.closed:
            raise Unavailable("the model was closed", retry_after_s=1)
        if self.num_running < self._max_running and not self._waiting:
            self.num_running += 1
            self._changed()
            return
        if self.num_waiting >= self._max_waiting:
            raise QueueFull(
                f"{self.num_waiting} requests are waiting, the bound is {self._max_waiting}",
                hint="retry after a pause",
                limit=self._max_waiting,
                retry_after_s=1,
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), place))
        self._changed()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was given and cannot be used
                self._leave()
            raise

    def _leave(self) -> None:
        self.num_running -= 1
        while self._waiting and self.num_running < self._max_running:
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():
                self.num_running += 1
                place.set_result(None)
        self._changed()

    def _changed(self) -> None:
        observers, self._observers = self._observers, []
        for condition, changed in observers:
            if changed.done():
                continue
            if condition():
                changed.set_result(None)
            else:
                self._observers.append((condition, changed))


class _Answer:
    """One of the `n` answers, token by token."""

    def __init__(
        self,
        index: int,
        script: tuple[str, ...],
        vocabulary: dict[str, int],
        sampling: SamplingParams,
        prompt: PromptSummary,
    ) -> None:
        self._index = index
        self._script = script
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._prompt: PromptSummary | None = prompt
        self._held = ""  # may turn out to be the start of a stop string
        self._num_tokens = 0
        self._first_token_ns = 0
        self.finished = False

    def step(self, room: int, arrival_ns: int, scheduled_ns: int) -> GenerateDelta:
        """The next token; the end of sequence counts as one that has no text."""
        sampling = self._sampling
        now_ns = time.monotonic_ns()
        self._first_token_ns = self._first_token_ns or now_ns
        may_stop = self._num_tokens >= sampling.min_tokens
        ended = self._num_tokens >= len(self._script) and may_stop and not sampling.ignore_eos
        text = "" if ended else self._script[self._num_tokens % len(self._script)]
        token_id = len(self._vocabulary) if ended else self._vocabulary[text]
        reason = FinishReason.STOP if ended else None
        stop_reason: str | int | None = None
        self._num_tokens += 1
        if may_stop and not ended and token_id in sampling.stop_token_ids:
            reason, stop_reason = FinishReason.STOP, token_id
            self._held += text if sampling.include_stop_str_in_output else ""
        elif not ended:
            self._held += text
            if stop := self._find_stop(may_stop):
                reason, stop_reason = FinishReason.STOP, stop
        if reason is None and self._num_tokens >= min(room, sampling.max_tokens or room):
            reason = FinishReason.LENGTH
        self.finished = reason is not None
        prompt, self._prompt = self._prompt, None
        return GenerateDelta(
            index=self._index,
            text=self._release(),
            token_ids=(token_id,),
            logprobs=()
            if sampling.logprobs is None
            else (_logprobs(token_id, text, sampling.logprobs, self._vocabulary),),
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt=prompt,
            timing=None
            if reason is None
            else GenerateTiming(
                arrival_ns=arrival_ns,
                first_scheduled_ns=scheduled_ns,
                first_token_ns=self._first_token_ns,
                last_token_ns=now_ns,
            ),
        )

    def _find_stop(self, may_stop: bool) -> str | None:
        found = [(at, stop) for stop in self._sampling.stop if (at := self._held.find(stop)) >= 0]
        if not found or not may_stop:
            return None
        at, stop = min(found)
        included = len(stop) if self._sampling.include_stop_str_in_output else 0
        self._held = self._held[: at + included]
        return stop

    def _release(self) -> str:
        """The text that no stop string can take back any more."""
        keep = 0
        if not self.finished:
            for stop in self._sampling.stop:
                for length in range(min(len(stop) - 1, len(self._held)), keep, -1):
                    if self._held.endswith(stop[:length]):
                        keep = length
                        break
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _logprobs(
    token_id: int, text: str, num_top: int, vocabulary: dict[str, int]
) -> PositionLogprobs:
    """Made-up but consistent: the chosen token has half of the mass, each next one half of the rest."""
    chosen = TokenLogprob(token_id=token_id, token=text, logprob=-0.6931471805599453, rank=1)
    others = [(other, number) for other, number in vocabulary.items() if number != token_id]
    top = [chosen] + [
        TokenLogprob(number, other, chosen.logprob * (rank + 2), rank + 2)
        for rank, (other, number) in enumerate(others[: max(num_top - 1, 0)])
    ]
    return PositionLogprobs(chosen=chosen, top=tuple(top[:num_top]))
