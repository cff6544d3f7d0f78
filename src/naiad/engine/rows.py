"""Sampling parameters of the running sequences, one row each, and the step's `SamplingBatch` from them.

Rows are set when a sequence is admitted and read in every step. The arrays live on the host; only what
a step needs is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from naiad.engine.messages import EngineSampling
from naiad.engine.sampling import Penalties, SamplingBatch, uniforms

_COLUMNS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")


@dataclass(slots=True)
class Draw:
    """One row that draws a token in this step."""

    row: int
    token_ids: Sequence[int]
    """Prompt and answer so far; the position of the drawn token is its length."""
    num_prompt: int


@dataclass(slots=True)
class _Bias:
    """What is added to a row's logits, made once: the lists may be long and the steps are many."""

    tokens: torch.Tensor
    values: torch.Tensor
    num_always: int
    """The first ones, of logit_bias; the others only until there are `min_tokens`."""
    min_tokens: int


def _bias_of(sampling: EngineSampling, device: torch.device) -> _Bias | None:
    bias = sampling.logit_bias
    masked = sampling.stop_token_ids if sampling.min_tokens else ()
    if not bias and not masked:
        return None
    return _Bias(
        torch.tensor([*bias, *masked], device=device),
        torch.tensor([*bias.values(), *[float("-inf")] * len(masked)], device=device),
        len(bias),
        sampling.min_tokens,
    )


class RowTable:
    """Sampling parameters by row.

    Args:
        num_rows: Most sequences that run at once.
        vocab_size: Pads histories.
        device: Where batches go.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._values = np.zeros((num_rows, len(_COLUMNS)), dtype=np.float32)
        self._top_k = np.zeros(num_rows, dtype=np.int64)
        self._seeds = np.zeros(num_rows, dtype=np.uint64)
        self._num_logprobs = np.full(num_rows, -1, dtype=np.int64)
        self._plain = np.ones(num_rows, dtype=np.bool_)
        """Greedy and nothing else: the row needs no parameters."""
        self._biases: list[_Bias | None] = [None] * num_rows

    def set(self, row: int, sampling: EngineSampling, index: int) -> None:
        """Give `row` to answer `index` of a request with these parameters."""
        s = sampling
        self._values[row] = (
            s.temperature,
            s.top_p,
            s.min_p,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
        )
        self._top_k[row] = max(s.top_k, 0)
        self._seeds[row] = (s.seed + index) % 2**64
        self._num_logprobs[row] = -1 if s.logprobs is None else s.logprobs
        penalised = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)
        self._plain[row] = not (
            s.temperature > 0 or penalised or s.logit_bias or s.min_tokens or s.logprobs is not None
        )
        self._biases[row] = _bias_of(s, self._device)

    def batch(self, draws: Sequence[Draw]) -> SamplingBatch:
        """The parameters of the rows that draw, in their order."""
        batch = SamplingBatch(num_rows=len(draws))
        rows = np.fromiter((draw.row for draw in draws), dtype=np.int64, count=len(draws))
        if self._plain[rows].all():
            return batch
        values = torch.from_numpy(self._values[rows]).to(self._device).split(1, dim=1)
        temperature, top_p, min_p, repetition, presence, frequency = values
        if bool((temperature > 0).any()):
            batch.temperature = temperature
            lengths = np.fromiter((len(d.token_ids) for d in draws), np.int64, count=len(draws))
            batch.uniform = uniforms(self._seeds[rows], lengths).to(self._device)
            if bool((top_p < 1).any()):
                batch.top_p = top_p
            if bool((min_p > 0).any()):
                batch.min_p = min_p
            if self._top_k[rows].any():
                batch.top_k = torch.from_numpy(self._top_k[rows]).unsqueeze(1).to(self._device)
        penalised = (repetition != 1) | (presence != 0) | (frequency != 0)
        if bool(penalised.any()):
            some = penalised.squeeze(1).nonzero().squeeze(1)
            rates = (repetition[some], presence[some], frequency[some])
            batch.penalties = self._penalties(draws, some, *rates)
        batch.bias = self._bias(draws)
        most = int(self._num_logprobs[rows].max())
        batch.num_logprobs = most if most >= 0 else None
        return batch

    def _penalties(
        self,
        draws: Sequence[Draw],
        some: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> Penalties:
        chosen = [draws[number] for number in some.tolist()]
        longest = max(len(draw.token_ids) for draw in chosen)
        history = np.full((len(chosen), longest), self._vocab_size, dtype=np.int64)
        for line, draw in zip(history, chosen, strict=True):
            line[: len(draw.token_ids)] = draw.token_ids
        num_prompt = np.array([[draw.num_prompt] for draw in chosen])
        return Penalties(
            rows=some,
            history=torch.from_numpy(history).to(self._device),
            num_prompt=torch.from_numpy(num_prompt).to(self._device),
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _bias(
        self, draws: Sequence[Draw]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """logit_bias, and -inf on stop tokens while an answer is shorter than min_tokens."""
        counts = [0] * len(draws)
        tokens: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for number, draw in enumerate(draws):
            bias = self._biases[draw.row]
            if bias is None:
                continue
            is_short = len(draw.token_ids) - draw.num_prompt < bias.min_tokens
            counts[number] = count = len(bias.tokens) if is_short else bias.num_always
            tokens.append(bias.tokens[:count])
            values.append(bias.values[:count])
        if not any(counts):
            return None
        rows = torch.arange(len(draws)).repeat_interleave(torch.tensor(counts))
        return rows.to(self._device), torch.cat(tokens), torch.cat(values)
