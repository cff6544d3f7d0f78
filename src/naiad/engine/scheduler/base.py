"""What a scheduler hands to the engine loop and takes back. No torch, no clock.

`Scheduler` (in `planner`) is driven as: `add`/`cancel` whenever messages arrive, then `plan`, run the
plan, `commit` its results. With run-ahead a further plan may be made before the last is committed.
"""

from __future__ import annotations

import msgspec

from naiad.engine.kv.base import KvCopy
from naiad.engine.scheduler.sequence import Sequence


class RowPlan(msgspec.Struct, eq=False):
    """Compute `num_tokens` tokens of `sequence`, from position `start` on, in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """True if the last of them is the newest known token, so that the step yields the next one."""


class StepPlan(msgspec.Struct, eq=False):
    """One step of the model: rows of one token first (decode), then longer chunks (prefill)."""

    rows: list[RowPlan]
    admitted: list[Sequence]
    """Sequences that got their row in this plan (first time or after preemption)."""
    copies: list[KvCopy]
    """To be carried out before the step."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step, over all rows."""
        return sum(row.num_tokens for row in self.rows)


class SequenceUpdate(msgspec.Struct, eq=False):
    """What committing a step changed for one sequence."""

    sequence: Sequence
    token_ids: list[int]
    """New tokens, the stop token included; empty for a prefill chunk that is not the last."""
    finish_reason: str | None = None
    stop_token_id: int | None = None


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one scheduler, resolved (no zeros left)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    max_model_len: int
    priority_aging_s: float = 10.0
    """A waiting sequence's priority improves by one each time it has waited this long, so that no
    stream of urgent requests starves it."""
    max_in_flight_steps: int = 1
    """Plans that may be uncommitted at once; 1: no run-ahead, as `Engine` runs it: a runner must not
    wait for the sampled tokens to make more of it."""
