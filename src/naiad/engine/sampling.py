"""From logits to tokens: every sampling parameter as tensor operations over rows.

Order: logit_bias and min_tokens, penalties, temperature, min_p, top_k, top_p, draw. A row's answer
depends on its own logits, parameters, seed and position only: filters are computed per row, and the one
random number of a row is a counter-based function of (seed, position), so that batching changes nothing.
Log probabilities are of the unmodified distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

NUM_CANDIDATES = 512
"""top_p looks at this many of the most likely tokens before it sorts the whole vocabulary."""

MIN_TEMPERATURE = 1e-5
"""Anything colder is greedy: logits divided by much less overflow."""


@dataclass(slots=True)
class Penalties:
    """Rows with a repetition, presence or frequency penalty, and the tokens they have seen."""

    rows: torch.Tensor
    """`[some]` indices into the batch."""
    history: torch.Tensor
    """`[some, longest]` token ids, prompt first; padded with the vocabulary size."""
    num_prompt: torch.Tensor
    """`[some, 1]` how many of them are prompt."""
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    """`[some, 1]` fp32."""


@dataclass(slots=True)
class SamplingBatch:
    """Parameters of the rows that draw a token in this step; None where every row is neutral."""

    num_rows: int
    temperature: torch.Tensor | None = None
    """`[rows, 1]` fp32, 0 for greedy rows; None: all greedy."""
    top_k: torch.Tensor | None = None
    """`[rows, 1]` int64, 0 for all."""
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    """`[rows, 1]` fp32 in [0, 1): each row's random number."""
    penalties: Penalties | None = None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Rows, token ids and values to add; -inf forbids."""
    num_logprobs: int | None = None
    """The most that any row asks for; None: no row asks."""


@dataclass(slots=True)
class LogprobBatch:
    """Log probabilities of chosen tokens and of the most likely ones, fp32."""

    chosen: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> torch.Tensor:
    """One number in [0, 1) for each (seed, position), shape `[rows, 1]` fp32.

    Two rounds of splitmix64 (Steele, Lea and Flood, 2014) over seed and counter.
    """
    with np.errstate(over="ignore"):
        state = _splitmix(seeds ^ _splitmix(positions.astype(np.uint64)))
    values = (state >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(values).unsqueeze(1)


def _splitmix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: `[rows, vocab]`, any float type; not changed.
        batch: Parameters of the same rows.

    Returns:
        `[rows]` int64.
    """
    if batch.bias is None and batch.penalties is None and batch.temperature is None:
        return greedy(logits)
    scores = logits.float() if logits.dtype != torch.float32 else logits.clone()
    if batch.bias is not None:
        rows, tokens, values = batch.bias
        scores.index_put_((rows, tokens), values, accumulate=True)
    if batch.penalties is not None:
        _penalise(scores, batch.penalties)
    if batch.temperature is None or batch.uniform is None:
        return greedy(scores)
    certain = batch.temperature < MIN_TEMPERATURE
    kept = _filter(scores / batch.temperature.masked_fill(certain, 1.0), batch)
    drawn = _draw(kept, batch.uniform)
    return torch.where(certain.squeeze(1), greedy(scores), drawn)


def greedy(scores: torch.Tensor) -> torch.Tensor:
    """The first most likely token of each row, `[rows]` int64."""
    if scores.device.type == "cpu":  # numpy's is vectorised; torch's takes 40 times as long in bf16
        return torch.from_numpy(scores.float().numpy().argmax(-1))
    return scores.argmax(-1)


def _penalise(scores: torch.Tensor, penalties: Penalties) -> None:
    """Apply repetition, presence and frequency penalties to their rows, in place."""
    vocab = scores.shape[1]
    rows, history = penalties.rows, penalties.history
    columns = torch.arange(history.shape[1], device=history.device)
    generated = torch.where(columns < penalties.num_prompt, vocab, history)
    counts = scores.new_zeros(len(rows), vocab + 1)
    seen = counts.scatter(1, history, 1.0)[:, :vocab] > 0
    counts = counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
    counts = counts[:, :vocab]
    values = scores[rows]
    factor = torch.where(values > 0, 1 / penalties.repetition, penalties.repetition)
    values = torch.where(seen, values * factor, values)
    values -= penalties.frequency * counts + penalties.presence * (counts > 0)
    scores[rows] = values


def _filter(scores: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Set to -inf what min_p, top_k and top_p exclude; `scores` is changed."""
    if batch.min_p is not None:
        floor = scores.amax(-1, keepdim=True) + batch.min_p.log()
        scores.masked_fill_(scores < floor, float("-inf"))
    if batch.top_k is not None:
        limit = batch.top_k.clamp(max=scores.shape[1])
        best = scores.topk(int(limit.max()), dim=-1).values
        floor = best.gather(1, (limit - 1).clamp(min=0))
        scores.masked_fill_((scores < floor) & (limit > 0), float("-inf"))
    if batch.top_p is not None:
        rows = (batch.top_p < 1).squeeze(1).nonzero().squeeze(1)
        if len(rows):
            scores[rows] = _keep_nucleus(scores[rows], batch.top_p[rows])
    return scores


def _keep_nucleus(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches `top_p` `[rows, 1]`."""
    total = scores.logsumexp(-1, keepdim=True)
    num_candidates = min(NUM_CANDIDATES, scores.shape[1])
    floor, reached = _nucleus_floor(scores, total, top_p, num_candidates)
    if not bool(reached.all()):
        far = (~reached).nonzero().squeeze(1)
        floor[far], _ = _nucleus_floor(scores[far], total[far], top_p[far], scores.shape[1])
    return scores.masked_fill(scores < floor, float("-inf"))


def _nucleus_floor(
    scores: torch.Tensor, total: torch.Tensor, top_p: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest score inside each row's nucleus, and whether the candidates hold all of it."""
    best = scores.topk(num_candidates, dim=-1).values
    mass = (best - total).exp().cumsum(-1)
    # A token is in while the mass before it has not reached p; the first always is.
    inside = (mass < top_p).sum(-1, keepdim=True)
    floor = best.gather(1, inside.clamp(max=num_candidates - 1))
    return floor, (inside < num_candidates).squeeze(1)


def _draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert each row's cumulative distribution, in token order, at its uniform number."""
    mass = scores.softmax(-1).cumsum(-1)
    point = uniform * mass[:, -1:]
    found = torch.searchsorted(mass, point, right=True).squeeze(1)
    # Rounding can put the point on the end of the distribution: take the last token with any mass.
    last = torch.searchsorted(mass, mass[:, -1:].contiguous()).squeeze(1)
    return torch.minimum(found, last).clamp(max=scores.shape[1] - 1)


def logprobs(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> LogprobBatch:
    """Log probabilities of `chosen` `[rows]` and of the `num_top` most likely tokens.

    Args:
        logits: `[rows, vocab]`, unmodified, any float type.
        chosen: Token ids.
        num_top: 0 or more.
    """
    values = logits.float()
    total = values.logsumexp(-1, keepdim=True)
    picked = values.gather(1, chosen.unsqueeze(1))
    rank = (values > picked).sum(-1) + 1
    best = values.topk(min(num_top, values.shape[1]), dim=-1)
    return LogprobBatch((picked - total).squeeze(1), rank, best.indices, best.values - total)
