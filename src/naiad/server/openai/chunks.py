"""What OpenAI's clients read: chunks of a stream, and whole replies, from `GenerateDelta`s.

A plain piece of text is the hot path: the constant parts of its chunk are built once per answer, and
a token costs one JSON string and one concatenation. Everything else goes through structs.
"""

from __future__ import annotations

import abc
from typing import Any

import msgspec

from naiad.core.generation import GenerateDelta, PositionLogprobs, PromptSummary, TokenLogprob

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class Usage:
    """Token counts of a request, summed over prompts and answers."""

    __slots__ = ("_answers_per_prompt", "num_cached", "num_output", "num_prompt")

    def __init__(self, answers_per_prompt: int) -> None:
        self._answers_per_prompt = answers_per_prompt
        self.num_prompt = 0
        self.num_cached = 0
        self.num_output = 0

    def add_prompt(self, index: int, prompt: PromptSummary) -> None:
        """Count a prompt once, with the first of its answers."""
        if index % self._answers_per_prompt == 0:
            self.num_prompt += prompt.num_tokens
            self.num_cached += prompt.num_cached_tokens

    def reply(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": self.num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


class Form(abc.ABC):
    """How one route words its answers. `Chat` and `Completion` are the two."""

    id_prefix = ""
    object = ""
    chunk_object = ""

    @abc.abstractmethod
    def start(self) -> dict[str, Any] | None:
        """The content of an answer's first chunk, if the form has one that says nothing yet."""

    @abc.abstractmethod
    def choice(self, delta: GenerateDelta, text_offset: int) -> dict[str, Any]:
        """A choice of a chunk; keys in OpenAI's order."""

    @abc.abstractmethod
    def whole_choice(self, answer: Answer) -> dict[str, Any]:
        """A choice of a whole reply."""

    @abc.abstractmethod
    def plain(self, index: int) -> tuple[bytes, bytes]:
        """A choice with text alone, before and after the JSON string."""


class Answer:
    """One answer, collected."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []
        self.logprobs: list[PositionLogprobs] = []
        self.last = GenerateDelta(index=index)
        self.prompt: PromptSummary | None = None

    def add(self, delta: GenerateDelta) -> None:
        """Append a delta."""
        self.texts.append(delta.text)
        self.logprobs += delta.logprobs
        self.last = delta
        self.prompt = delta.prompt or self.prompt


class Chat(Form):
    """`/v1/chat/completions`.

    Args:
        num_top: How many alternatives each position lists; None: no log probabilities.
    """

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, num_top: int | None) -> None:
        self._num_top = num_top

    def start(self) -> dict[str, Any] | None:
        return {
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def choice(self, delta: GenerateDelta, text_offset: int) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def whole_choice(self, answer: Answer) -> dict[str, Any]:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None},
            "logprobs": None if self._num_top is None else self._logprobs(answer.logprobs),
            "finish_reason": answer.last.finish_reason,
            "stop_reason": answer.last.stop_reason,
        }

    def plain(self, index: int) -> tuple[bytes, bytes]:
        return (
            b'{"index":%d,"delta":{"content":' % index,
            b'},"logprobs":null,"finish_reason":null}',
        )

    def _logprobs(self, positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...]) -> Any:
        return {
            "content": [
                {
                    **_chat_token(position.chosen),
                    "top_logprobs": [
                        _chat_token(token) for token in position.top[: self._num_top or 0]
                    ],
                }
                for position in positions
            ]
        }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": list(token.token.encode()),
    }


class Completion(Form):
    """`/v1/completions`.

    Args:
        num_top: How many alternatives each position lists; None: no log probabilities.
        has_prompt_logprobs: Whether choices list those of the prompt.
    """

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, num_top: int | None, *, has_prompt_logprobs: bool) -> None:
        self._num_top = num_top
        self._has_prompt_logprobs = has_prompt_logprobs

    def start(self) -> dict[str, Any] | None:
        return None

    def choice(self, delta: GenerateDelta, text_offset: int) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.logprobs, text_offset) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def whole_choice(self, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": answer.index,
            "text": "".join(answer.texts),
            "logprobs": None if self._num_top is None else self._logprobs(answer.logprobs, 0),
            "finish_reason": answer.last.finish_reason,
            "stop_reason": answer.last.stop_reason,
        }
        if self._has_prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(answer.prompt)
        return choice

    def plain(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"text":' % index, b',"logprobs":null,"finish_reason":null}'

    def _logprobs(
        self, positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...], offset: int
    ) -> Any:
        offsets = []
        for position in positions:
            offsets.append(offset)
            offset += len(position.chosen.token)
        chosen = [position.chosen for position in positions]
        return {
            "tokens": [token.token for token in chosen],
            "token_logprobs": [token.logprob for token in chosen],
            "top_logprobs": [
                {token.token: token.logprob for token in position.top[: self._num_top]}
                for position in positions
            ]
            if self._num_top
            else None,
            "text_offset": offsets,
        }


def prompt_logprobs(prompt: PromptSummary | None) -> Any:
    """vLLM's form: per prompt token null or `{token_id: {logprob, rank, decoded_token}}`."""
    if prompt is None or prompt.logprobs is None:
        return None
    return [
        position
        and {
            str(token.token_id): {
                "logprob": token.logprob,
                "rank": token.rank,
                "decoded_token": token.token,
            }
            for token in (position.chosen, *position.top)
        }
        for position in prompt.logprobs
    ]


class ChunkWriter:
    """Turns deltas into server-sent events.

    Args:
        form: The route's wording.
        head: `id`, `created` and `model` of the reply.
        num_choices: How many answers the stream has.
        include_usage: Every chunk says `"usage":null` but the last, which has no choice.
    """

    def __init__(
        self, form: Form, head: dict[str, Any], num_choices: int, *, include_usage: bool
    ) -> None:
        self._form = form
        self._head = {"id": head["id"], "object": form.chunk_object, **head}
        self._usage_null = {"usage": None} if include_usage else {}
        before = b"data: " + _encode(self._head)[:-1] + b',"choices":['
        after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        plain = [form.plain(index) for index in range(num_choices)]
        self._plain = [(before + left, right + after) for left, right in plain]
        self._started = [False] * num_choices
        self._num_chars = [0] * num_choices

    def __call__(self, delta: GenerateDelta) -> bytes:
        """The events of one delta; empty when it has nothing to show yet."""
        index = delta.index
        if delta.finish_reason is None and not delta.logprobs and self._started[index]:
            if not delta.text:
                return b""
            left, right = self._plain[index]
            return left + _encode(delta.text) + right
        return self._general(delta)

    def usage(self, usage: Usage) -> bytes:
        """The chunk that comes last if usage was asked for."""
        return _event({**self._head, "choices": [], "usage": usage.reply()})

    def _general(self, delta: GenerateDelta) -> bytes:
        index = delta.index
        events = b""
        if not self._started[index]:
            self._started[index] = True
            start = self._form.start()
            if start is not None:
                events = self._chunk({"index": index, **start})
        if delta.text or delta.logprobs or delta.finish_reason is not None:
            events += self._chunk(self._form.choice(delta, self._num_chars[index]))
            self._num_chars[index] += sum(len(p.chosen.token) for p in delta.logprobs)
        return events

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return _event({**self._head, "choices": [choice], **self._usage_null})


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


def whole_reply(
    form: Form, head: dict[str, Any], answers: list[Answer], usage: Usage
) -> dict[str, Any]:
    """The reply of a request that does not stream."""
    return {
        "id": head["id"],
        "object": form.object,
        **head,
        "choices": [form.whole_choice(answer) for answer in answers],
        "usage": usage.reply(),
    }
