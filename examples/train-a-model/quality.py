"""How many functions a model completes: by the decoder, and by counting n-grams for comparison."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from corpus import EOS_ID, Function, num_statements
from tokenizers import Tokenizer
from torch import Tensor

MAX_TOKENS = 256

Completer = Callable[[Sequence[Sequence[int]]], list[list[int]]]
"""Prompts to the `MAX_TOKENS` likeliest next tokens of each, fewer where EOS ends it (left out)."""


def greedy(next_logits: Callable[[Tensor, Tensor], Tensor], device: str) -> Completer:
    """A `Completer` without a cache: everything is computed anew for each token.

    Args:
        next_logits: Ids `[rows, tokens]` and the position to look at `[rows]` to `[rows, vocab]`.
        device: Where to keep the ids.
    """

    @torch.no_grad()
    def complete(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width + MAX_TOKENS, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        rows = torch.arange(len(prompts), device=device)
        for number in range(MAX_TOKENS):
            # What is right of a row's last token is not seen by it.
            logits = next_logits(ids[:, : width + number], lengths - 1)
            ids[rows, lengths] = logits.argmax(-1)
            lengths += 1
        answers = zip(prompts, ids.tolist(), strict=True)
        return [_until_end(row[len(prompt) :][:MAX_TOKENS]) for prompt, row in answers]

    return complete


class NGram:
    """Counts of what follows the last `order - 1` tokens, backing off to fewer where unseen."""

    def __init__(self, stream: np.ndarray[Any, Any], order: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tables = [_likeliest(stream, size, vocab_size) for size in range(order)]

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """As `Completer`."""
        answers = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(MAX_TOKENS):
                ids.append(self._next(ids))
            answers.append(_until_end(ids[len(prompt) :]))
        return answers

    def _next(self, ids: list[int]) -> int:
        for size in range(min(len(self._tables) - 1, len(ids)), -1, -1):
            contexts, following = self._tables[size]
            key = 0
            for token in ids[len(ids) - size :]:
                key = key * self._vocab_size + token
            at = int(np.searchsorted(contexts, key))
            if at < len(contexts) and contexts[at] == key:
                return int(following[at])
        raise AssertionError("the empty context has been seen")


def _likeliest(
    stream: np.ndarray[Any, Any], size: int, vocab_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every context of `size` tokens as one number, ascending, and what follows it most often."""
    context = np.zeros(len(stream) - size, dtype=np.int64)
    for offset in range(size):
        context = context * vocab_size + stream[offset : offset + len(context)]
    pairs, counts = np.unique(context * vocab_size + stream[size:], return_counts=True)
    pairs = pairs[np.lexsort((-counts, pairs // vocab_size))]
    contexts, first = np.unique(pairs // vocab_size, return_index=True)
    return contexts, pairs[first] % vocab_size


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS_ID)] if EOS_ID in tokens else tokens


def score(
    functions: Sequence[Function], tokenizer: Tokenizer, complete: Completer
) -> tuple[dict[str, float], list[str]]:
    """The shares of functions that a completer continues well, and the completed functions.

    `good`: it adds at least two statements, and the function parses. `good_and_ended`: it also ends
    by itself. A completion ends at the first line that is not indented, or with the document; one
    that does neither loses its last line, which is unfinished.
    """
    prompts = [tokenizer.encode(function.prefix).ids for function in functions]
    texts, num_good, num_ended = [], 0, 0
    for function, tokens in zip(functions, complete(prompts), strict=True):
        lines = tokenizer.decode(tokens).split("\n")
        outside = [n for n, line in enumerate(lines) if n and line and not line[0].isspace()]
        is_ended = bool(outside) or len(tokens) < MAX_TOKENS
        end = outside[0] if outside else len(lines) if is_ended else len(lines) - 1
        texts.append(function.prefix + "\n".join(lines[:end]))
        try:
            is_good = num_statements(ast.parse(texts[-1]).body[0]) >= 2
        except SyntaxError:
            is_good = False
        num_good += is_good
        num_ended += is_good and is_ended
    total = max(len(functions), 1)
    return {"good": num_good / total, "good_and_ended": num_ended / total}, texts
