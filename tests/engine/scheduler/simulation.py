"""A scripted model with a cache whose contents can be checked, and a loop that drives a scheduler.

The device runs plans in the order of their launch, as a stream does. Instead of keys and values it
stores, at each place, a hash of all tokens up to there: what real keys and values depend on. Before a
row is believed, every place it reads must hold the hash of its own tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from naiad.core.errors import QueueFull
from naiad.engine.kv.pages import PageManager
from naiad.engine.kv.slots import SlotManager
from naiad.engine.messages import EngineRequest, EngineSampling
from naiad.engine.scheduler.base import SchedulerConfig
from naiad.engine.scheduler.planner import Scheduler
from naiad.engine.scheduler.sequence import Sequence, State

if TYPE_CHECKING:
    from naiad.engine.kv.base import KvManager
    from naiad.engine.scheduler.base import StepPlan

STEP_NS = 1_000_000
STOP_TOKEN = 99
MAX_MODEL_LEN = 48


def request(
    number: int,
    prompt: list[int],
    *,
    max_tokens: int = 4,
    priority: int = 0,
    n: int = 1,
    min_tokens: int = 0,
    prompt_logprobs: int | None = None,
) -> EngineRequest:
    """A request that ends at `STOP_TOKEN` or after `max_tokens`."""
    sampling = EngineSampling(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=0,
        stop_token_ids=(STOP_TOKEN,),
        prompt_logprobs=prompt_logprobs,
    )
    return EngineRequest(
        id=number, prompt_token_ids=prompt, sampling=sampling, priority=priority, arrival_ns=0
    )


def make_kv(
    layout: str,
    capacity_tokens: int = 64,
    *,
    page_tokens: int = 4,
    num_slots: int = 4,
    max_model_len: int = MAX_MODEL_LEN,
    prefix_cache: bool = True,
) -> KvManager:
    """A small cache of either layout; copies as short as one token are worth it."""
    if layout == "pages":
        num_pages = capacity_tokens // page_tokens
        return PageManager(num_pages, page_tokens, prefix_cache=prefix_cache)
    return SlotManager(
        num_slots,
        max_model_len,
        capacity_tokens,
        page_tokens,
        prefix_cache=prefix_cache,
        min_copy_tokens=1,
        num_spare_slots=2,
    )


def make_scheduler(
    kv: KvManager,
    *,
    rows: int = 4,
    budget: int = 64,
    queue: int = 1000,
    queue_tokens: int = 10**6,
    in_flight: int = 1,
    aging_s: float = 10.0,
) -> Scheduler:
    """A scheduler with small limits."""
    config = SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_queued_requests=queue,
        max_queued_tokens=queue_tokens,
        max_model_len=MAX_MODEL_LEN,
        priority_aging_s=aging_s,
        max_in_flight_steps=in_flight,
    )
    return Scheduler(config, kv)


def scripted_token(number: int, index: int, place: int) -> int:
    """Token `place` of an answer: few different ones, so that answers have beginnings in common."""
    return (number * 7 + index * 3 + place * place) % 3


class Device:
    """Runs plans at once; hides their results until asked."""

    def __init__(self, kv: KvManager, block_tokens: int, stops: dict[int, int]) -> None:
        self._kv = kv
        self._block_tokens = block_tokens
        self._stops = stops  # by request: place in the answer where STOP_TOKEN is sampled
        self._cache: dict[tuple[int, int], int] = {}
        self._rows: dict[int, list[int]] = {}  # tokens on the device by key

    def run(self, plan: StepPlan) -> list[int]:
        """Carry out copies and rows; return one token for each row that samples."""
        for sequence in plan.admitted:
            self._rows[sequence.key] = list(sequence.token_ids)
        for copy in plan.copies:
            assert copy.source != copy.target
            for place in range(copy.num_tokens):
                self._cache[copy.target, place] = self._cache[copy.source, place]
        for row in plan.rows:
            hashes = self._hashes(row.sequence, row.start + row.num_tokens)
            for position in range(row.start, row.start + row.num_tokens):
                self._cache[self._place(row.sequence, position)] = hashes[position]
        sampled = []
        for row in plan.rows:
            self.check(row.sequence, row.start + row.num_tokens)
            if row.samples:
                sampled.append(self._sample(row.sequence, row.start + row.num_tokens))
        return sampled

    def writes(self, plan: StepPlan) -> dict[tuple[int, int], int]:
        """Places that the rows of `plan` write, and for which sequence."""
        return {
            self._place(row.sequence, position): row.sequence.key
            for row in plan.rows
            for position in range(row.start, row.start + row.num_tokens)
        }

    def check(self, sequence: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` places of `sequence` hold its own tokens and their past."""
        for position, value in enumerate(self._hashes(sequence, num_tokens)):
            found = self._cache.get(self._place(sequence, position))
            assert found == value, f"wrong keys at position {position} of {sequence.key}"

    def _sample(self, sequence: Sequence, position: int) -> int:
        tokens = self._rows[sequence.key]
        assert position == len(tokens), "sampled from a token that is not the newest"
        place = position - sequence.num_prompt
        number = sequence.request.id
        stops = self._stops.get(number) == place
        token = STOP_TOKEN if stops else scripted_token(number, sequence.index, place)
        tokens.append(token)
        return token

    def _hashes(self, sequence: Sequence, num_tokens: int) -> list[int]:
        value, hashes = 0, []
        tokens = self._rows[sequence.key]
        assert num_tokens <= len(tokens), "computes a token that does not exist yet"
        for token in tokens[:num_tokens]:
            value = hash((value, token))
            hashes.append(value)
        return hashes

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block, place = divmod(position, self._block_tokens)
        return self._kv.block_table(sequence.key)[block], place


@dataclass
class Answer:
    """What the client of one answer has seen."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    end_step: int = -1


class Engine:
    """The engine loop on a virtual clock: one step is a millisecond."""

    def __init__(
        self,
        kv: KvManager,
        scheduler: Scheduler,
        *,
        block_tokens: int = 4,
        in_flight: int = 1,
        stops: dict[int, int] | None = None,
    ) -> None:
        self.kv = kv
        self.scheduler = scheduler
        self.answers: dict[tuple[int, int], Answer] = {}
        self.cancelled: set[tuple[int, int]] = set()
        self.step = 0
        self._device = Device(kv, block_tokens, stops or {})
        self._max_in_flight = in_flight
        self._in_flight: deque[tuple[StepPlan, list[int]]] = deque()
        self._live: list[Sequence] = []
        self._writes: deque[dict[tuple[int, int], int]] = deque()  # of the plans in flight

    @property
    def now_ns(self) -> int:
        """Virtual time."""
        return self.step * STEP_NS

    def add(self, new: EngineRequest) -> bool:
        """Queue a request; False if the queue is full."""
        try:
            self.scheduler.add(new, self.now_ns)
        except QueueFull:
            return False
        for index in range(new.sampling.n):
            self.answers[new.id, index] = Answer()
        return True

    def cancel(self, number: int, index: int = -1) -> None:
        """Cancel answers; from now on none of them may be heard of."""
        for sequence in self.scheduler.cancel(number, index):
            assert sequence.state is State.FINISHED
            self.cancelled.add((number, sequence.index))

    def turn(self) -> StepPlan | None:
        """Plan and launch a step, and commit the oldest one if no more may be in flight."""
        self.step += 1
        plan = self.scheduler.plan(self.now_ns)
        if plan is not None:
            self._check_nobody_in_flight_is_disturbed(plan)
            self._in_flight.append((plan, self._device.run(plan)))
            self._live = list({row.sequence.key: row.sequence for row in plan.rows}.values())
        assert plan or self._in_flight or not self.scheduler.has_work(), "stuck with work to do"
        if self._in_flight and (plan is None or len(self._in_flight) >= self._max_in_flight):
            self._commit()
        return plan

    def run(self, max_steps: int = 10_000) -> None:
        """Turn until nothing is left to do."""
        while self.scheduler.has_work():
            self.turn()
            assert self.step < max_steps, "this does not end"

    def check(self) -> None:
        """What must hold between any two calls."""
        self.kv.check()
        assert self.kv.used_tokens <= self.kv.capacity_tokens
        for sequence in self._live:
            assert sequence.num_computed <= sequence.num_launched
            ahead = self._max_in_flight - 1
            assert sequence.num_launched <= len(sequence.token_ids) + ahead
            if sequence.state is State.RUNNING:
                self._device.check(sequence, sequence.num_computed)

    def _check_nobody_in_flight_is_disturbed(self, plan: StepPlan) -> None:
        """Rows and places of a step in flight belong to its sequences until it is committed."""
        writes = self._device.writes(plan)
        rows = {row.sequence.row: row.sequence for row in plan.rows}
        assert len(rows) == len(plan.rows), "two sequences in one row"
        for earlier, _ in self._in_flight:
            for row in earlier.rows:
                assert rows.get(row.sequence.row, row.sequence) is row.sequence
        for busy in self._writes:
            assert all(busy.get(place, key) == key for place, key in writes.items())
        self._writes.append(writes)

    def _commit(self) -> None:
        plan, sampled = self._in_flight.popleft()
        self._writes.popleft()
        for update in self.scheduler.commit(plan, sampled, self.now_ns):
            name = update.sequence.request.id, update.sequence.index
            assert name not in self.cancelled, "heard of a cancelled answer"
            answer = self.answers[name]
            assert answer.finish_reason is None, "heard of an ended answer"
            answer.token_ids += update.token_ids
            answer.finish_reason = update.finish_reason
            if update.finish_reason:
                answer.end_step = self.step
