"""What a language model is asked and what it answers: the records of `LanguageModel.generate`.

Nothing here knows tokenizers, templates or tensors on a device, and nothing runs.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from naiad.core.errors import InvalidRequest
from naiad.core.model import ModelMetadata

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_BYTES = 16 * 1024
MAX_INT = 2**31 - 1
MAX_PRIORITY = 100
"""Either way; a queue that ages by 10 s makes the widest gap up in 33 minutes."""

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when to stop. None: the model's own default applies.

    Logits are changed in this order: logit_bias and min_tokens, penalties, temperature, min_p,
    top_k, top_p. The same seed gives the same answer alone and in any batch.
    """

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    """Independent answers to the one prompt; answer i is drawn with seed + i."""
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    """Most tokens to generate; None: as many as the context allows."""
    min_tokens: Count = 0
    """No end of sequence and no stop token before this many."""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    """0: greedy."""
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None
    """Keep the k most likely tokens; 0 or -1: all."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    """Keep the smallest set of most likely tokens whose probability reaches p."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    """Keep tokens at least this likely relative to the most likely one."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    """Divide (or multiply, when negative) the logits of tokens in prompt or answer; 1: off."""
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    """Added to the logits of these token ids."""
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    """Below 2^64."""
    stop: Annotated[tuple[str, ...], Meta(max_length=MAX_STOPS)] = ()
    """Stop before the first of these strings; 16 KiB together at most."""
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    """Give out the text of the stop string, or of the stop token, that ended the answer."""
    skip_special_tokens: bool = True
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the chosen token's log probability and this many of the most likely ones."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        # A bound of 2^64 does not fit msgspec's Meta; a ValueError here names the path as well.
        if self.seed is not None and self.seed >= 2**64:
            raise ValueError(f"Expected `int` < 2^64, got seed {self.seed}")
        if self.stop:
            size = sum([len(str(text).encode(errors="replace")) for text in self.stop])
            if size > MAX_STOP_BYTES:
                raise ValueError(f"stop has {size} bytes together, at most {MAX_STOP_BYTES} work")


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """Text, tokenized by the model with its special tokens added."""

    text: str


class TokensPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """Token ids, used as they are."""

    token_ids: tuple[int, ...]


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Messages `{"role": ..., "content": ...}`, rendered by the model's chat template."""

    messages: tuple[dict[str, Any], ...]
    add_generation_prompt: bool = True


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to continue it."""

    id: str
    """For logs and the client; unique per server is enough, uniqueness is not required."""
    prompt: TextPrompt | TokensPrompt | ChatPrompt
    sampling: SamplingParams = SamplingParams()
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Lower runs first; equal priorities in order of arrival. One less is worth 10 s of waiting, so
    that nobody waits forever."""

    def __post_init__(self) -> None:
        # Protocols make requests in Python, where msgspec checks no range.
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidRequest(
                f"priority {self.priority} is not in the range -{MAX_PRIORITY} to {MAX_PRIORITY}",
                hint="lower runs first, 0 is usual",
            )


class FinishReason(enum.StrEnum):
    """Why an answer ended. A refused or failed one raises instead."""

    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context was reached


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's log probability (natural, of the model's unmodified distribution)."""

    token_id: int
    token: str
    """Its text alone; invalid UTF-8 appears as U+FFFD."""
    logprob: float
    rank: int = 0
    """1 for the most likely token; 0 where unknown."""


class PositionLogprobs(msgspec.Struct, frozen=True):
    """The token at one position and the most likely ones there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class PromptSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the prompt once it has been read; comes with an answer's first delta."""

    num_tokens: int
    num_cached_tokens: int
    """How many of them came from the prefix cache."""
    text: str | None = None
    """The prompt as text, where it was given or rendered as text."""
    logprobs: tuple[PositionLogprobs | None, ...] | None = None
    """One per prompt token, the first None; only if `prompt_logprobs` asked for it, and only with
    answer 0: they are the same for all."""


class GenerateTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Stamps of one answer on the monotonic clock of the host, in nanoseconds."""

    arrival_ns: int
    first_scheduled_ns: int
    first_token_ns: int
    last_token_ns: int


class GenerateDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next piece of one of the `n` answers. `text` may be empty while bytes are incomplete."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    """One per token id, if asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of each answer."""
    stop_reason: str | int | None = None
    """The stop string or stop token that ended it; None for end of sequence or length."""
    prompt: PromptSummary | None = None
    """On the first delta of each answer."""
    timing: GenerateTiming | None = None
    """On the last delta of each answer."""


class Generates(Protocol):
    """What stands between the records: anything that continues prompts (`core.language`)."""

    @property
    def metadata(self) -> ModelMetadata:
        """As of any model."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        """Continue the prompt; see `LanguageModel.generate`."""
