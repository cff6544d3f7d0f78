"""Continuous batching: decide which tokens of which sequences the next step computes.

The scheduler is pure. It is told of requests, cancellations and finished steps, and answers one
question, "what should the next step compute?". It opens nothing, starts nothing and reads no clock.
It thinks in tokens, not in phases. Rules, in order:

1. Running sequences that need one more token come first, then chunks of prompts that have started,
   then sequences from the queue, until tokens, rows or KV cache are used up.
2. Everybody has a place in one total order (see `queue`) that never changes. Whoever is first always
   gets on; the last running one gives way when the KV cache is full (it is computed again later).
3. A waiting sequence makes a running one give way only if it has strictly better priority and comes
   before it in that order. So no two sequences can preempt each other, and aging protects too.
4. With steps in flight, the next token of a sequence is planned before it is known. What turns out
   to be beyond its end is dropped, and its row and cache stay untouched until that step is done.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING

from naiad.core.errors import InvalidRequest, QueueFull
from naiad.engine.scheduler.base import SequenceUpdate, StepPlan
from naiad.engine.scheduler.draft import Draft
from naiad.engine.scheduler.queue import WaitingQueue
from naiad.engine.scheduler.sequence import Sequence, State

if TYPE_CHECKING:
    from collections.abc import Sequence as TokenIds

    from naiad.engine.kv.base import KvManager
    from naiad.engine.messages import EngineRequest
    from naiad.engine.scheduler.base import RowPlan, SchedulerConfig

_order = attrgetter("order")

_SPARE_TOKENS_PER_ROW = 8
"""Starting a sequence leaves this much room for each running one: without it, a preempted sequence
would come back at once and be preempted again by the next token."""
_MAX_SPARE_SHARE = 1 / 16
"""Of the capacity, over all running ones."""

_RETRY_AFTER_S = 1.0


def _queue_full(text: str, setting: str, limit: int) -> QueueFull:
    hint = f"retry after a pause, or raise {setting}"
    return QueueFull(text, hint=hint, limit=limit, retry_after_s=_RETRY_AFTER_S)


class Scheduler:
    """Plans steps for one engine. See the module docstring; drive it as `base` says.

    Attributes:
        num_preemptions: Times a running sequence had to give way.
        num_prefix_query_tokens: Tokens looked up in the prefix cache.
        num_prefix_hit_tokens: How many of those were found.
    """

    def __init__(self, config: SchedulerConfig, kv: KvManager) -> None:
        self._config = config
        self._kv = kv
        self._queue = WaitingQueue()
        self._running: list[Sequence] = []  # by order
        self._requests: dict[int, list[Sequence]] = {}  # unfinished answers by request id
        self._held: dict[int, list[Sequence]] = {}  # answers 1.. by key of an answer 0 not ready
        self._num_held = 0
        self._num_new = 0  # requests that have never run, and the tokens of their prompts:
        self._num_new_tokens = 0  # what the bounds of the queue count
        self._free_rows = list(range(config.max_num_seqs))  # heap
        self._in_flight: deque[StepPlan] = deque()
        self._num_departing = 0
        self._blocked: Sequence | None = None  # did not fit, and nothing was released since
        self._next_key = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold a row and go on."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a row: new, preempted, or waiting for answer 0 of their request."""
        return len(self._queue) + self._num_held

    def has_work(self) -> bool:
        """Whether anything is left to plan or to commit."""
        return bool(self._running or self._in_flight or self.num_waiting)

    def add(self, request: EngineRequest, now_ns: int) -> None:
        """Queue `request`.

        Raises:
            InvalidRequest: It can never run here; the message has the numbers.
            QueueFull: `max_queued_requests` are waiting, beside those that free rows will take, or
                prompts of more than `max_queued_tokens` together would be.
        """
        self._validate(request)
        self._check_room(request)
        due_ns = now_ns + int(request.priority * self._config.priority_aging_s * 1e9)
        sequences = []
        for index in range(request.sampling.n):
            sequence = Sequence(self._next_key, request, index)
            sequence.order = (due_ns, self._next_key)
            self._next_key += 1
            sequences.append(sequence)
        first, *siblings = sequences
        self._requests[request.id] = sequences
        self._queue.push(first)
        self._count_new(first, 1)
        if siblings:
            for sibling in siblings:
                sibling.parent = first
            self._held[first.key] = siblings
            self._num_held += len(siblings)

    def cancel(self, request_id: int, index: int = -1) -> list[Sequence]:
        """End answer `index` of a request, or all of them (-1); unknown ones are ignored.

        Row and cache are free at once, or with the commit of the last plan that computes it.

        Returns:
            The sequences that ended; nothing more is reported for them.
        """
        answers = self._requests.get(request_id, ())
        ended = [sequence for sequence in answers if index in (-1, sequence.index)]
        for sequence in reversed(ended):  # answer 0 last: the others may be waiting for it
            self._end(sequence)
        return ended

    def fail_all(self) -> list[Sequence]:
        """Drop everything, plans in flight and cached prefixes included: the device state is lost.

        Returns:
            The sequences that ended.
        """
        for plan in self._in_flight:
            for row in plan.rows:
                row.sequence.num_in_flight = 0
                if row.sequence.departing:
                    self._depart(row.sequence)
        self._in_flight.clear()
        ended: list[Sequence] = []
        for request_id in list(self._requests):
            ended += self.cancel(request_id)
        self._kv.take_copies()
        self._kv.reset_prefix_cache()
        return ended

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next step, or None: nothing to do, or nothing before a commit."""
        if len(self._in_flight) >= self._config.max_in_flight_steps:
            return None
        draft = Draft(self._config.max_num_batched_tokens)
        for sequence in self._plan_next_tokens(draft):
            if draft.budget > 0 and sequence.state is State.RUNNING and not sequence.departing:
                draft.add_chunk(sequence)
        if self._queue:
            self._admit(draft, now_ns)
        rows = draft.singles + draft.chunks
        if not rows:
            return None
        plan = StepPlan(rows, draft.admitted, self._kv.take_copies())
        self._in_flight.append(plan)
        return plan

    def commit(self, plan: StepPlan, sampled: TokenIds[int], now_ns: int) -> list[SequenceUpdate]:
        """Take in the results of `plan`, the oldest one in flight.

        Args:
            plan: What was run.
            sampled: One token for each row with `samples`, in order.
            now_ns: The time.

        Returns:
            What changed for sequences that had not ended before.
        """
        assert plan is self._in_flight[0], "plans are committed in the order they were made"
        self._in_flight.popleft()
        updates: list[SequenceUpdate] = []
        tokens = iter(sampled)
        for row in plan.rows:
            sequence = row.sequence
            sequence.num_in_flight -= 1
            token = next(tokens) if row.samples else None
            if sequence.state is State.RUNNING:
                updates.append(self._advance(row, token, now_ns))
            if sequence.departing and not sequence.num_in_flight:
                self._depart(sequence)
        return updates

    def _validate(self, request: EngineRequest) -> None:
        num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        if not num_prompt:
            raise InvalidRequest("the prompt is empty", hint="send at least one token")
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id} is in use", hint="choose another")
        text = (
            f"prompt of {num_prompt} tokens + max_tokens {max_tokens} = {num_prompt + max_tokens}"
        )
        limit = self._config.max_model_len
        if num_prompt + max_tokens > limit:
            raise InvalidRequest(
                f"{text} exceed the model's context of {limit} tokens",
                hint="shorten the prompt or lower max_tokens",
                limit=limit,
            )
        limit = self._kv.max_tokens_per_sequence()
        if num_prompt + max_tokens > limit:
            raise InvalidRequest(
                f"{text} exceed the KV cache of {limit} tokens",
                hint="shorten the prompt, lower max_tokens or raise kv_cache_tokens",
                limit=limit,
            )

    def _check_room(self, request: EngineRequest) -> None:
        limit = self._config.max_queued_requests
        if self._num_new >= limit + len(self._free_rows):
            text = f"{limit} requests are waiting, which is the limit"
            raise _queue_full(text, "max_queued_requests", limit)
        limit, num_prompt = self._config.max_queued_tokens, len(request.prompt_token_ids)
        # A prompt longer than the limit may wait alone: no retry would shorten it.
        if self._num_new and self._num_new_tokens + num_prompt > limit:
            text = f"{self._num_new_tokens} prompt tokens wait, {num_prompt} more exceed the limit"
            raise _queue_full(f"{text} of {limit}", "max_queued_tokens", limit)

    def _count_new(self, sequence: Sequence, change: int) -> None:
        """`sequence` begins to wait (1), or starts or ends (-1); only the first answer counts."""
        if sequence.index == 0:
            self._num_new += change
            self._num_new_tokens += change * sequence.num_prompt

    def _plan_next_tokens(self, draft: Draft) -> list[Sequence]:
        """Plan one token for each running sequence that needs one; return those that need more."""
        prefills: list[Sequence] = []
        reserve = self._kv.reserve
        for sequence in self._running.copy():
            start, num_known = sequence.num_launched, len(sequence.token_ids)
            if start < num_known - 1:
                prefills.append(sequence)
                continue
            if draft.budget <= 0 or sequence.departing or sequence.state is not State.RUNNING:
                continue
            if start >= num_known and self._is_last_in_flight(sequence):
                continue
            if reserve(sequence.key, start + 1) or self._make_room(sequence, draft):
                draft.add_next(sequence)
        return prefills

    def _is_last_in_flight(self, sequence: Sequence) -> bool:
        """Whether the tokens in flight bring `sequence` to its greatest length."""
        sampling = sequence.request.sampling
        return sequence.num_launched + 1 >= sequence.num_prompt + sampling.max_tokens

    def _make_room(self, sequence: Sequence, draft: Draft) -> bool:
        """Preempt from the end of the order until `sequence` has its next place, or is out itself."""
        while not self._num_departing:
            victim = self._running[-1]
            self._preempt(victim, draft)
            if victim is sequence:
                return False
            if self._kv.reserve(sequence.key, sequence.num_launched + 1):
                return True
        return False  # somebody's cache comes free with a step in flight: wait for that

    def _admit(self, draft: Draft, now_ns: int) -> None:
        """Start waiting sequences in order until one does not fit."""
        while draft.budget > 0:
            sequence = self._queue.peek()
            if sequence is None or sequence is self._blocked:
                return
            if not self._start(sequence):
                if self._make_way(sequence, draft):
                    continue
                self._blocked = sequence
                return
            self._queue.pop()
            if not sequence.num_preemptions:
                sequence.first_scheduled_ns = now_ns
                self._count_new(sequence, -1)
            insort(self._running, sequence, key=_order)
            draft.admitted.append(sequence)
            draft.add_chunk(sequence)

    def _start(self, sequence: Sequence) -> bool:
        """Give `sequence` a row and cache for all its tokens, or change nothing."""
        if not self._free_rows:
            return False
        num_cached = self._start_cache(sequence)
        if num_cached is None:
            return False
        if not self._kv.reserve(sequence.key, len(sequence.token_ids)):
            self._kv.free(sequence.key)
            return False
        if sequence.token_ids is sequence.request.prompt_token_ids:
            sequence.token_ids = sequence.token_ids.copy()
        sequence.row = heapq.heappop(self._free_rows)
        sequence.state = State.RUNNING
        sequence.num_computed = sequence.num_launched = num_cached
        return True

    def _start_cache(self, sequence: Sequence) -> int | None:
        """Tokens of `sequence` that need not be computed; None if there is no room."""
        parent, num_shared = sequence.parent, sequence.num_prompt - 1
        spare_tokens = self._spare_tokens()
        if parent and parent.state is State.RUNNING and 0 < num_shared <= parent.num_computed:
            num_free = self._kv.capacity_tokens - self._kv.used_tokens
            fits = num_free >= spare_tokens and self._kv.fork(parent.key, sequence.key, num_shared)
            if not fits:
                return None
            sequence.parent = None
            return num_shared
        # Logits of cached tokens are not there to report.
        needs_all = sequence.request.sampling.prompt_logprobs is not None
        if needs_all and sequence.index == 0 and not sequence.num_generated:
            return self._kv.match(sequence.key, (), spare_tokens)
        num_cached = self._kv.match(sequence.key, sequence.token_ids, spare_tokens)
        if num_cached is not None:
            sequence.num_cached = num_cached
            self.num_prefix_query_tokens += len(sequence.token_ids)
            self.num_prefix_hit_tokens += num_cached
        return num_cached

    def _spare_tokens(self) -> int:
        wanted = _SPARE_TOKENS_PER_ROW * len(self._running)
        return min(wanted, int(self._kv.capacity_tokens * _MAX_SPARE_SHARE))

    def _make_way(self, sequence: Sequence, draft: Draft) -> bool:
        """Preempt one running sequence that has to give way to a waiting one (rule 3).

        Returns:
            True if something came free; False if there is nobody, or not yet.
        """
        if self._num_departing:
            return False
        priority = sequence.request.priority
        victims: list[Sequence] = []
        for running in reversed(self._running):
            if running.order < sequence.order:
                break
            if running.request.priority > priority:
                victims.append(running)
        num_free = self._kv.capacity_tokens - self._kv.used_tokens
        num_free += sum(victim.num_launched for victim in victims)
        if not victims or num_free < len(sequence.token_ids):
            return False
        self._preempt(victims[0], draft)
        return not self._num_departing

    def _preempt(self, victim: Sequence, draft: Draft) -> None:
        """Send a running sequence back to the queue, at the latest when its last step is done."""
        draft.drop(victim)
        self.num_preemptions += 1
        victim.num_preemptions += 1
        if victim.num_in_flight:
            self._set_departing(victim)
        else:
            self._requeue(victim)

    def _requeue(self, sequence: Sequence) -> None:
        self._leave_running(sequence)
        self._release(sequence)
        sequence.state = State.WAITING
        sequence.num_computed = sequence.num_launched = 0
        self._queue.push(sequence)

    def _advance(self, row: RowPlan, token: int | None, now_ns: int) -> SequenceUpdate:
        """Commit one row of a sequence that goes on."""
        sequence = row.sequence
        token_ids = sequence.token_ids
        sequence.num_computed = end = row.start + row.num_tokens
        self._kv.append(sequence.key, token_ids[row.start : end])
        if token is None:
            return SequenceUpdate(sequence, [])
        if len(token_ids) == sequence.num_prompt:
            sequence.first_token_ns = now_ns
            self._let_siblings_go(sequence)
        token_ids.append(token)
        update = SequenceUpdate(sequence, [token])
        sampling = sequence.request.sampling
        num_generated = len(token_ids) - sequence.num_prompt
        if token in sampling.stop_token_ids and num_generated > sampling.min_tokens:
            update.finish_reason, update.stop_token_id = "stop", token
        elif num_generated >= sampling.max_tokens or len(token_ids) >= self._config.max_model_len:
            update.finish_reason = "length"
        if update.finish_reason:
            self._end(sequence)
        return update

    def _end(self, sequence: Sequence) -> None:
        """Make `sequence` FINISHED and give back what it holds, now or when its step is done."""
        answers = self._requests[sequence.request.id]
        answers.remove(sequence)
        if not answers:
            del self._requests[sequence.request.id]
        was_waiting = sequence.state is State.WAITING
        sequence.state = State.FINISHED
        self._let_siblings_go(sequence)
        if was_waiting:
            self._leave_waiting(sequence)
            return
        self._leave_running(sequence)
        if sequence.num_in_flight or sequence.departing:
            self._set_departing(sequence)
        else:
            self._release(sequence)

    def _leave_waiting(self, sequence: Sequence) -> None:
        held = self._held.get(sequence.parent.key, []) if sequence.parent else []
        if sequence in held:
            held.remove(sequence)
            self._num_held -= 1
            return
        self._queue.discard()
        if not sequence.num_preemptions:
            self._count_new(sequence, -1)

    def _let_siblings_go(self, first: Sequence) -> None:
        """Queue the answers that waited for answer 0, `first`: its prompt is there, or never will be."""
        siblings = self._held.pop(first.key, ())
        self._num_held -= len(siblings)
        for sibling in siblings:
            self._queue.push(sibling)

    def _leave_running(self, sequence: Sequence) -> None:
        del self._running[bisect_left(self._running, sequence.order, key=_order)]

    def _set_departing(self, sequence: Sequence) -> None:
        if not sequence.departing:
            sequence.departing = True
            self._num_departing += 1

    def _depart(self, sequence: Sequence) -> None:
        """Nothing of a departing sequence is in flight any more."""
        sequence.departing = False
        self._num_departing -= 1
        if sequence.state is State.RUNNING:
            self._requeue(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._kv.free(sequence.key)
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = -1
        self._blocked = None
