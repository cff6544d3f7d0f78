"""A step plan in the making: rows under a token budget. Knows no policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from naiad.engine.scheduler.base import RowPlan

if TYPE_CHECKING:
    from naiad.engine.scheduler.sequence import Sequence


class Draft:
    """Rows of one step, and the token budget left. Keeps `num_launched` and `num_in_flight` true."""

    __slots__ = ("admitted", "budget", "chunks", "singles")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.singles: list[RowPlan] = []
        self.chunks: list[RowPlan] = []
        self.admitted: list[Sequence] = []

    def add_next(self, sequence: Sequence) -> None:
        """Compute one token: the newest, which may still be in the making by a step in flight."""
        start = sequence.num_launched
        self.singles.append(RowPlan(sequence, start, 1, True))
        sequence.num_launched = start + 1
        sequence.num_in_flight += 1
        self.budget -= 1

    def add_chunk(self, sequence: Sequence) -> None:
        """Compute as many of the known tokens as the budget allows."""
        start, end = sequence.num_launched, len(sequence.token_ids)
        num_tokens = min(self.budget, end - start)
        row = RowPlan(sequence, start, num_tokens, start + num_tokens == end)
        (self.singles if num_tokens == 1 else self.chunks).append(row)
        sequence.num_launched = start + num_tokens
        sequence.num_in_flight += 1
        self.budget -= num_tokens

    def drop(self, sequence: Sequence) -> None:
        """Take the row of `sequence` out again, if it has one."""
        for rows in (self.singles, self.chunks):
            for place, row in enumerate(rows):
                if row.sequence is sequence:
                    del rows[place]
                    sequence.num_launched = row.start
                    sequence.num_in_flight -= 1
                    self.budget += row.num_tokens
                    return
