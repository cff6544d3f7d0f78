"""Between the contract of `LanguageModel.generate` and the engine's messages. Pure.

`GenerateRequest` becomes `EngineRequest`: prompt to token ids, every default resolved, everything
checked against the model. `SequenceOutput` becomes `GenerateDelta`: an `Answer` keeps what one
answer needs in between (detokenizer, stop strings, stamps). The server's model and the offline
`LLM` both use this and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from naiad.backends.llm.defaults import ModelDefaults
from naiad.backends.llm.stops import StopMatcher
from naiad.backends.llm.template import ChatTemplate
from naiad.backends.llm.tokenizer import Tokenizer
from naiad.core.errors import InvalidModel, InvalidRequest
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
from naiad.engine.messages import EngineRequest, EngineSampling, SequenceOutput, TokenLogprobs

Value = TypeVar("Value", int, float)

_REASONS = {reason.value: reason for reason in FinishReason}
_SEED_MODULUS = 2**64


class Limits(msgspec.Struct, frozen=True):
    """What the loaded engine can take."""

    vocab_size: int
    max_model_len: int


class Prompt(msgspec.Struct, frozen=True):
    """A prompt as the engine reads it, and its text where there is one."""

    token_ids: list[int]
    text: str | None = None


class CheckpointText:
    """Everything about text that comes with a checkpoint.

    Raises (from `from_folder`):
        InvalidModel: a file is missing or not what its name says.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, defaults: ModelDefaults
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self._max_token_chars = max(tokenizer.max_token_chars(), 1)

    @staticmethod
    def from_folder(folder: Path) -> CheckpointText:
        """Read tokenizer, chat template and generation defaults."""
        _check_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
        return CheckpointText(
            tokenizer,
            ChatTemplate.from_folder(folder, tokenizer.special_tokens),
            ModelDefaults.from_folder(folder, tokenizer),
        )

    def read_prompt(self, prompt: TextPrompt | TokensPrompt | ChatPrompt, limits: Limits) -> Prompt:
        """Render and tokenize. About a millisecond per 2,000 characters; any thread will do.

        Raises:
            InvalidRequest: an empty or too long prompt, ids outside the vocabulary, messages that
                the chat template refuses.
        """
        add_special_tokens = True
        match prompt:
            case TokensPrompt(token_ids):
                return _checked(Prompt(list(token_ids)), limits)
            case TextPrompt(text):
                pass
            case ChatPrompt(messages, add_generation_prompt):
                text = self.template.render(messages, add_generation_prompt=add_generation_prompt)
                add_special_tokens = self.template.is_plain
        # Longer than the longest tokens could fill: refused without the work of tokenizing it.
        if len(text) > limits.max_model_len * self._max_token_chars:
            num_tokens = len(text) // self._max_token_chars
            raise _too_long(f"at least {num_tokens}", limits.max_model_len)
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return _checked(Prompt(ids, text), limits)


def _check_folder(folder: Path) -> None:
    hint = "give the folder of a checkpoint in Hugging Face's layout"
    if not folder.is_dir():
        raise InvalidModel(f"{folder} is not a folder", hint=hint)
    if not (folder / "config.json").is_file():
        raise InvalidModel(f"{folder} has no config.json", hint=hint)


def is_long(prompt: TextPrompt | TokensPrompt | ChatPrompt, limit: int) -> bool:
    """Whether reading it takes longer than for `limit` characters of text.

    Everything of a chat counts, keys and empty values too: the template sees all of it. Takes no
    more time than `limit` allows, however long the prompt is.
    """
    match prompt:
        case TextPrompt(text):
            return len(text) > limit
        case TokensPrompt(token_ids):
            return len(token_ids) > limit
        case ChatPrompt(messages):
            return _weight(messages, limit) > limit


_VALUE_WEIGHT = 8
"""What a value or key of a message costs, in characters, beside its own."""


def _weight(messages: Sequence[Any], limit: int) -> int:
    """Characters of everything in `messages`; once past `limit`, of a part."""
    weight = 0
    found: list[Any] = [messages]
    while found and weight <= limit:
        value = found.pop()
        if isinstance(value, str):
            weight += len(value)
        elif isinstance(value, dict):
            found += [list(value), list(value.values())]
        elif isinstance(value, (list, tuple)):
            weight += _VALUE_WEIGHT * len(value)
            if weight <= limit:
                found += value
    return weight


def engine_request(
    request: GenerateRequest,
    prompt: Prompt,
    defaults: ModelDefaults,
    limits: Limits,
    *,
    number: int,
    arrival_ns: int,
) -> EngineRequest:
    """`request` with nothing left open, as the engine takes it under the id `number`.

    Raises:
        InvalidRequest: sampling values out of range, token ids outside the vocabulary.
    """
    return EngineRequest(
        id=number,
        prompt_token_ids=prompt.token_ids,
        sampling=_resolve(request.sampling, len(prompt.token_ids), defaults, limits),
        priority=request.priority,
        arrival_ns=arrival_ns,
    )


def _resolve(
    sampling: SamplingParams, num_prompt: int, defaults: ModelDefaults, limits: Limits
) -> EngineSampling:
    _check_sampling(sampling, limits)
    room = limits.max_model_len - num_prompt
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    eos = () if sampling.ignore_eos else defaults.eos_token_ids
    seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
    return EngineSampling(
        n=sampling.n,
        max_tokens=max_tokens,
        min_tokens=min(sampling.min_tokens, max_tokens),
        temperature=_or(sampling.temperature, defaults.temperature),
        top_k=max(_or(sampling.top_k, defaults.top_k), 0),
        top_p=_or(sampling.top_p, defaults.top_p),
        min_p=_or(sampling.min_p, defaults.min_p),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=_or(sampling.repetition_penalty, defaults.repetition_penalty),
        logit_bias=sampling.logit_bias,
        seed=seed % _SEED_MODULUS,
        stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *eos))),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _check_sampling(sampling: SamplingParams, limits: Limits) -> None:
    try:  # made in Python, a struct has not been checked yet
        msgspec.convert(msgspec.to_builtins(sampling, str_keys=True), SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None
    for name, ids in (
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        _check_ids(name, ids, limits.vocab_size)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}, max_tokens only {sampling.max_tokens}",
            hint="lower min_tokens",
        )


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name}: token id {token_id} is outside the vocabulary of {vocab_size}",
                hint=f"use ids from 0 to {vocab_size - 1}",
            )


def _checked(prompt: Prompt, limits: Limits) -> Prompt:
    ids = prompt.token_ids
    if not ids:
        raise InvalidRequest("the prompt is empty", hint="send at least one token")
    if len(ids) >= limits.max_model_len:
        raise _too_long(str(len(ids)), limits.max_model_len)
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        _check_ids("prompt", ids, limits.vocab_size)
    return prompt


def _too_long(num_tokens: str, max_model_len: int) -> InvalidRequest:
    return InvalidRequest(
        f"the prompt has {num_tokens} tokens, the model takes at most {max_model_len} of prompt and "
        "answer together",
        hint="shorten the prompt, or load the model with a larger max_model_len",
        limit=max_model_len,
    )


class Answer:
    """One of the `n` answers while it is being written.

    Args:
        index: Which of the answers.
        request: What was asked.
        prompt: As it was sent to the engine.
        tokenizer: The model's.
        arrival_ns: When the request came, monotonic.
    """

    __slots__ = (
        "_arrival_ns",
        "_detokenizer",
        "_first_scheduled_ns",
        "_first_token_ns",
        "_is_plain",
        "_matcher",
        "_prompt",
        "_sampling",
        "_token_text",
        "finish_reason",
        "index",
        "num_tokens",
    )

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        prompt: Prompt,
        tokenizer: Tokenizer,
        arrival_ns: int,
    ) -> None:
        sampling = request.sampling
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._arrival_ns = arrival_ns
        self._first_scheduled_ns = 0
        self._first_token_ns = 0
        self._prompt = prompt
        self._sampling = sampling
        self._token_text = tokenizer.token_text
        self._detokenizer = tokenizer.detokenizer(
            prompt.token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._matcher = (
            StopMatcher(sampling.stop, include_stop=sampling.include_stop_str_in_output)
            if sampling.stop
            else None
        )
        self._is_plain = self._matcher is None and sampling.logprobs is None

    def feed(self, output: SequenceOutput, now_ns: int) -> GenerateDelta | None:
        """The delta for what one step produced; None if that is nothing.

        When `finish_reason` is set although the output has none, a stop string ended the answer
        and the engine must be told.
        """
        if self.num_tokens and self._is_plain and output.finish_reason is None:
            ids = output.token_ids
            self.num_tokens += len(ids)
            return GenerateDelta(
                index=self.index, text=self._detokenizer.feed(ids), token_ids=tuple(ids)
            )
        return self._feed_any(output, now_ns)

    def _feed_any(self, output: SequenceOutput, now_ns: int) -> GenerateDelta | None:
        is_first = self.num_tokens == 0
        if not output.token_ids and output.finish_reason is None:
            return None
        if is_first:
            self._first_scheduled_ns = output.first_scheduled_ns or now_ns
            self._first_token_ns = output.first_token_ns or now_ns
        text, stop = self._read_text(output)
        reason = _REASONS.get(output.finish_reason or "")
        stop_reason: str | int | None = stop
        if stop is not None:
            reason = FinishReason.STOP
        elif output.stop_token_id in self._sampling.stop_token_ids:
            stop_reason = output.stop_token_id
        self.finish_reason = reason
        return GenerateDelta(
            index=self.index,
            text=text,
            token_ids=tuple(output.token_ids),
            logprobs=self._logprobs(output.logprobs, self._sampling.logprobs),
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt=self._summary(output) if is_first else None,
            timing=None if reason is None else self._timing(output, now_ns),
        )

    def _read_text(self, output: SequenceOutput) -> tuple[str, str | None]:
        """Text that may be given out, and the stop string that ends it."""
        ids = output.token_ids
        begin, self.num_tokens = self.num_tokens, self.num_tokens + len(ids)
        if output.stop_token_id is not None and not self._sampling.include_stop_str_in_output:
            ids = ids[:-1]
        if self._matcher is None:
            text = self._detokenizer.feed(ids)
            return (text + self._detokenizer.flush() if output.finish_reason else text), None
        exempt = max(self._sampling.min_tokens - begin, 0)  # tokens no stop string may end
        text = self._detokenizer.feed(ids[:exempt])
        rest = self._detokenizer.feed(ids[exempt:])
        if output.finish_reason is not None:
            rest += self._detokenizer.flush()
        found = self._matcher.feed(rest)
        text += found.text
        if output.finish_reason is not None and found.stop is None:
            text += self._matcher.flush()
        return text, found.stop

    def _summary(self, output: SequenceOutput) -> PromptSummary:
        wanted = self._sampling.prompt_logprobs
        logprobs = None
        if output.prompt_logprobs is not None and wanted is not None:
            logprobs = tuple(
                None if at is None else _position(at, wanted, self._token_text)
                for at in output.prompt_logprobs
            )
        return PromptSummary(
            num_tokens=len(self._prompt.token_ids),
            num_cached_tokens=output.prompt_cached_tokens,
            text=self._prompt.text,
            logprobs=logprobs,
        )

    def _logprobs(
        self, found: list[TokenLogprobs] | None, wanted: int | None
    ) -> tuple[PositionLogprobs, ...]:
        if wanted is None or found is None:
            return ()
        return tuple(_position(at, wanted, self._token_text) for at in found)

    def _timing(self, output: SequenceOutput, now_ns: int) -> GenerateTiming:
        return GenerateTiming(
            arrival_ns=self._arrival_ns,
            first_scheduled_ns=output.first_scheduled_ns or self._first_scheduled_ns,
            first_token_ns=output.first_token_ns or self._first_token_ns,
            last_token_ns=now_ns,
        )


def _position(
    at: TokenLogprobs, num_top: int, token_text: Callable[[int], str]
) -> PositionLogprobs:
    top = zip(at.top_ids[:num_top], at.top_logprobs, strict=False)
    return PositionLogprobs(
        chosen=TokenLogprob(at.token_id, token_text(at.token_id), at.logprob, at.rank),
        top=tuple(
            TokenLogprob(token_id, token_text(token_id), logprob, rank)
            for rank, (token_id, logprob) in enumerate(top, start=1)
        ),
    )


def coalesce(deltas: Sequence[GenerateDelta]) -> list[GenerateDelta]:
    """The same answers in at most one delta each: for a reader who was slower than the engine."""
    groups: dict[int, list[GenerateDelta]] = {}
    for delta in deltas:
        groups.setdefault(delta.index, []).append(delta)
    return [group[0] if len(group) == 1 else _join(group) for group in groups.values()]


def _join(group: list[GenerateDelta]) -> GenerateDelta:
    first, last = group[0], group[-1]
    return GenerateDelta(
        index=first.index,
        text="".join([delta.text for delta in group]),
        token_ids=tuple([token_id for delta in group for token_id in delta.token_ids]),
        logprobs=tuple([at for delta in group for at in delta.logprobs]),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt=first.prompt,
        timing=last.timing,
    )
