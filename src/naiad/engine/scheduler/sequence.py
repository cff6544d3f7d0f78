"""One sequence as the scheduler sees it: tokens, progress and state. No torch."""

from __future__ import annotations

import enum

from naiad.engine.messages import EngineRequest


class State(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # in the queue, holds no row and no cache
    RUNNING = "running"  # holds a row and cache
    FINISHED = "finished"  # done, cancelled or failed; holds nothing


class Sequence:
    """Answer `index` of a request. `token_ids` is the prompt followed by what was generated.

    Invariant: `num_computed <= num_launched <= len(token_ids) + run-ahead`.
    """

    __slots__ = (
        "departing",
        "first_scheduled_ns",
        "first_token_ns",
        "index",
        "key",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_launched",
        "num_preemptions",
        "num_prompt",
        "order",
        "parent",
        "request",
        "row",
        "state",
        "token_ids",
    )

    def __init__(self, key: int, request: EngineRequest, index: int) -> None:
        self.key = key
        """Unique among live sequences; names it to the KV manager."""
        self.request = request
        self.index = index
        self.token_ids = request.prompt_token_ids
        """All answers share the list of the request until they start, and write into their own."""
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        """Tokens whose keys and values are committed: their step has finished."""
        self.num_launched = 0
        """Tokens whose computation has been planned; ahead of `num_computed` during a step."""
        self.num_cached = 0
        """Tokens found in the prefix cache at the last admission."""
        self.num_preemptions = 0
        self.row = -1
        """Row of the runner's state while RUNNING."""
        self.state = State.WAITING
        self.first_scheduled_ns = 0
        self.first_token_ns = 0
        self.num_in_flight = 0
        """Plans not committed yet that compute tokens of it."""
        self.departing = False
        """True: it gives row and cache back (finished or preempted) once nothing is in flight."""
        self.parent: Sequence | None = None
        """Answer 0 of the request, until this one has started from its prompt."""
        self.order = (0, 0)
        """Smaller runs first and is preempted last; fixed when the request arrives."""

    @property
    def num_generated(self) -> int:
        """Tokens generated and committed so far."""
        return len(self.token_ids) - self.num_prompt
