"""OpenAI request bodies, and the pure mapping from them to `GenerateRequest`.

Fields that nobody knows are ignored, as OpenAI's clients expect; fields that are known and not done
are refused with a reason. Ranges live in `SamplingParams` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from naiad.core.errors import InvalidRequest, Unsupported
from naiad.core.generation import (
    ChatPrompt,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from naiad.core.refusals import NO_GRAMMAR, REFUSED_SAMPLING, Refusal, refuse

MAX_DEPTH = 100
"""Of the values inside a message."""

_NO_TOOLS = Refusal("the server does not call tools", ("none", "auto"))
REFUSED: Mapping[str, Refusal] = {
    **REFUSED_SAMPLING,
    "suffix": Refusal("the model cannot fill in the middle"),
    "echo": Refusal("send prompt_logprobs for the prompt's log probabilities", (False,)),
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "response_format": NO_GRAMMAR,
    "audio": Refusal("the model generates text only"),
    "modalities": Refusal("the model generates text only", (["text"],)),
    "prediction": Refusal("predicted outputs are not used"),
    "web_search_options": Refusal("the server does not search"),
    "chat_template": Refusal("the template comes with the model, never with a request"),
    "chat_template_kwargs": Refusal("the template takes messages only"),
    "documents": Refusal("the template takes messages only"),
    "continue_final_message": Refusal("send the beginning through /v1/completions", (False,)),
    "return_tokens_as_token_ids": Refusal("tokens are returned as text", (False,)),
    "prompt_embeds": Refusal("prompts are text or token ids"),
    "return_token_ids": Refusal("tokens are returned as text", (False,)),
    "cache_salt": Refusal("prefixes are shared by all requests, or by none: --no-prefix-cache"),
    "reasoning_effort": Refusal("the template takes messages only", ("none",)),
    "length_penalty": Refusal("answers are sampled, not beam-searched", (0, 1)),
}
_FORMAT_TEXT = {"type": "text"}


class StreamOptions(msgspec.Struct):
    """OpenAI's, and vLLM's usage on every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """What completions and chat completions share; null means not given."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    add_special_tokens: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(SamplingBody, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[Any]
    logprobs: int | None = None


class Message(msgspec.Struct):
    """One chat message; other keys are passed to the template."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(SamplingBody, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None


_Body = TypeVar("_Body", CompletionBody, ChatBody)
_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (CompletionBody, ChatBody)
}
_decode_refused = msgspec.json.Decoder(
    msgspec.defstruct("Refused", [(name, Any, None) for name in REFUSED])
).decode
_SAME_NAME = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def decode(data: bytes, kind: type[_Body]) -> _Body:
    """A request body as `kind`; raises `InvalidRequest`, or `Unsupported` for refused fields."""
    try:
        body: _Body = _DECODERS[kind].decode(data)
        refused = msgspec.structs.asdict(_decode_refused(data))
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param=_param(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if refused["response_format"] == _FORMAT_TEXT:
        refused["response_format"] = None
    refuse(refused, REFUSED)
    _check(body)
    return body


def _check(body: SamplingBody) -> None:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest(
            "`stream_options` is only allowed with `stream`", param="stream_options"
        )
    if options is not None and options.continuous_usage_stats:
        raise Unsupported("`continuous_usage_stats` is not supported: use include_usage")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "`prompt_logprobs` is not available in a stream", param="prompt_logprobs"
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Unsupported(
            f"`best_of` {body.best_of} is not supported: every answer is returned; use n",
            param="best_of",
        )
    special = isinstance(body, CompletionBody)
    if body.add_special_tokens is not None and body.add_special_tokens is not special:
        raise Unsupported(
            f"`add_special_tokens` {str(not special).lower()} is not supported",
            hint="send the prompt as token ids",
            param="add_special_tokens",
        )


def _param(message: str) -> str | None:
    """`temperature` from "... - at `$.temperature`"."""
    _, found, path = message.rpartition("`$.")
    return path.rstrip("`") if found else None


def _sampling(body: SamplingBody, **extra: Any) -> SamplingParams:
    values = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    values.update((name, value) for name, value in extra.items() if value is not None)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if stop:
        if "" in stop:
            raise InvalidRequest("`stop` has an empty string", param="stop")
        values["stop"] = stop
    try:
        return msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param=_param(str(error))) from None


def read_completion(
    data: bytes, request_id: str, max_prompts: int
) -> tuple[CompletionBody, list[GenerateRequest]]:
    """A completion's body, and one request per prompt; raises as `decode` does."""
    body = decode(data, CompletionBody)
    prompts = _prompts(body.prompt, max_prompts)
    sampling = _sampling(
        body,
        logprobs=body.logprobs,
        max_tokens=16 if body.max_tokens is None else None,  # OpenAI's default
    )
    requests = [
        GenerateRequest(
            id=request_id, prompt=prompt, sampling=sampling, priority=body.priority or 0
        )
        for prompt in prompts
    ]
    return body, requests


def _prompts(prompt: str | list[Any], max_prompts: int) -> list[TextPrompt | TokensPrompt]:
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if not prompt:
        raise InvalidRequest("`prompt` is empty", param="prompt")
    if all(type(item) is int for item in prompt):
        return [TokensPrompt(tuple(prompt))]
    if len(prompt) > max_prompts:
        raise InvalidRequest(
            f"`prompt` has {len(prompt)} prompts, a request takes at most {max_prompts}",
            hint="send several requests, or start the server with a larger --max-prompts",
            param="prompt",
        )
    if all(isinstance(item, str) for item in prompt):
        return [TextPrompt(item) for item in prompt]
    if all(isinstance(item, list) and all(type(i) is int for i in item) for item in prompt):
        return [TokensPrompt(tuple(item)) for item in prompt]
    raise InvalidRequest(
        "`prompt` must be a string, a list of strings, a list of token ids or a list of those",
        param="prompt",
    )


def read_chat(data: bytes, request_id: str) -> tuple[ChatBody, GenerateRequest]:
    """A chat's body and its one request; raises as `decode` does."""
    body = decode(data, ChatBody)
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs`", param="top_logprobs")
    generation_prompt = True if body.add_generation_prompt is None else body.add_generation_prompt
    request = GenerateRequest(
        id=request_id,
        prompt=ChatPrompt(
            tuple(_message(number, item) for number, item in enumerate(body.messages)),
            add_generation_prompt=generation_prompt,
        ),
        sampling=_sampling(body, logprobs=logprobs, max_tokens=body.max_completion_tokens),
        priority=body.priority or 0,
    )
    return body, request


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message as the template gets it: content is a string."""
    where = f"messages[{number}]"
    try:
        known = msgspec.convert(message, Message)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{where}: {error}", param="messages") from None
    if isinstance(known.content, list):
        content: str | None = "\n".join(_part(where, part) for part in known.content)
    else:
        content = known.content
    if any(_depth(value) > MAX_DEPTH for key, value in message.items() if key != "content"):
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep", param="messages")
    return {**message, "content": content if content is not None else ""}


def _part(where: str, part: dict[str, Any]) -> str:
    kind = part.get("type")
    text = part.get("text") if kind == "text" else part.get("refusal")
    if kind not in ("text", "refusal"):
        raise Unsupported(
            f"{where} has a content part of type {kind!r}: the model takes text only",
            param="messages",
        )
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} has a text part without text", param="messages")
    return text


def _depth(value: Any) -> int:
    """How deep lists and objects nest; stops a little past `MAX_DEPTH`."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        containers = [item for item in level if isinstance(item, (list, dict))]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        depth += bool(containers)
    return depth
