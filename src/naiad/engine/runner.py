"""Runs one step on the device: cache copies, decoder, sampling, log probabilities. Arrays in, lists out.

Knows no requests and no scheduling; `engine.engine` turns a plan into its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from naiad.engine.batch import StepBatch
from naiad.engine.decoder import Decoder
from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.storage import KvStorage
from naiad.engine.messages import TokenLogprobs
from naiad.engine.sampling import SamplingBatch, logprobs, sample

PROMPT_LOGPROB_ROWS = 128
"""Prompt positions whose logits exist at once."""


@dataclass(slots=True)
class PromptSpan:
    """Positions of a prompt whose log probabilities are wanted in this step."""

    first: int
    """Index of the first token in the step."""
    next_ids: list[int]
    """The token that really follows each of them."""
    num_top: int


@dataclass(slots=True)
class StepResult:
    """What one step produced, in the order of `StepBatch.sampled`."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompts: list[list[TokenLogprobs]] = field(default_factory=list)
    """One list per `PromptSpan`."""


class Runner:
    """A decoder and its cache on one device."""

    def __init__(self, decoder: Decoder, storage: KvStorage) -> None:
        self._decoder, self._storage = decoder, storage

    @torch.inference_mode()
    def run(
        self,
        batch: StepBatch,
        sampling: SamplingBatch,
        copies: Sequence[KvCopy] = (),
        prompts: Sequence[PromptSpan] = (),
        released: Sequence[int] = (),
    ) -> StepResult:
        """Run one step; writes the cache.

        Args:
            batch: The step's tokens.
            sampling: Parameters of the rows in `batch.sampled`, in order.
            copies: Carried out first.
            prompts: Where prompt log probabilities are wanted.
            released: Blocks whose contents need not be kept.
        """
        self._storage.begin(batch, copies, released)
        x = self._decoder.hidden(batch, self._storage, every_token=bool(prompts))
        result = StepResult([])
        if prompts:
            result.prompts = [self._prompt_logprobs(x, span) for span in prompts]
            x = x[batch.sampled]
        if sampling.num_rows:
            logits = self._decoder.logits(x)
            chosen = sample(logits, sampling)
            if sampling.num_logprobs is not None:
                result.logprobs = _to_messages(logits, chosen, sampling.num_logprobs)
            result.token_ids = chosen.tolist()
        return result

    def _prompt_logprobs(self, x: torch.Tensor, span: PromptSpan) -> list[TokenLogprobs]:
        """In blocks of rows: logits of a whole prompt would be `[prompt, vocab]`."""
        found: list[TokenLogprobs] = []
        for start in range(0, len(span.next_ids), PROMPT_LOGPROB_ROWS):
            ids = span.next_ids[start : start + PROMPT_LOGPROB_ROWS]
            first = span.first + start
            logits = self._decoder.logits(x[first : first + len(ids)])
            found += _to_messages(logits, torch.tensor(ids, device=x.device), span.num_top)
        return found


def _to_messages(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    values = logprobs(logits, chosen, num_top)
    return [
        TokenLogprobs(*line)
        for line in zip(
            chosen.tolist(),
            values.chosen.tolist(),
            values.rank.tolist(),
            values.top_ids.tolist(),
            values.top.tolist(),
            strict=True,
        )
    ]
