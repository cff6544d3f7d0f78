"""Ten thousand requests over random traces: whatever happens, everybody gets their own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.engine.scheduler.simulation import (
    MAX_MODEL_LEN,
    STEP_NS,
    STOP_TOKEN,
    Engine,
    make_kv,
    make_scheduler,
    request,
    scripted_token,
)

NUM_EXAMPLES = 25  # for each of 8 kinds of engine
NUM_REQUESTS = 50  # of each example: 10,000 in all


@dataclass(frozen=True)
class Client:
    """One request of a trace, and what its client does."""

    family: int
    num_prompt: int
    num_own: int
    max_tokens: int
    min_tokens: int
    n: int
    priority: int
    gap_steps: int
    stop_at: int | None
    patience_steps: int | None
    cancel_index: int

    def prompt(self, number: int) -> list[int]:
        """A beginning that its family shares, then tokens of its own."""
        shared = [self.family * 10 + place % 7 for place in range(self.num_prompt)]
        own = [100 + number * 20 + place for place in range(self.num_own)]
        return (shared + own)[: MAX_MODEL_LEN - self.max_tokens]

    def expected(self, number: int, index: int) -> tuple[list[int], str]:
        """The answer that the script and the finish rules prescribe."""
        for place in range(self.min_tokens, self.max_tokens):
            if place == self.stop_at:
                answer = [scripted_token(number, index, before) for before in range(place)]
                return [*answer, STOP_TOKEN], "stop"
        stopped = self.stop_at if self.stop_at is not None else -1
        tokens = [scripted_token(number, index, place) for place in range(self.max_tokens)]
        if 0 <= stopped < self.max_tokens:
            tokens[stopped] = STOP_TOKEN
        return tokens, "length"


def maybe(values: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.none(), values)


clients = st.builds(
    Client,
    family=st.integers(0, 2),
    num_prompt=st.integers(1, 24),
    num_own=st.integers(0, 12),
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 3),
    n=st.sampled_from([1, 1, 1, 1, 2, 3]),
    priority=st.integers(-1, 2),
    gap_steps=st.integers(0, 4),
    stop_at=maybe(st.integers(0, 11)),
    patience_steps=maybe(st.integers(0, 30)),
    cancel_index=st.sampled_from([-1, -1, 0, 1]),
)


@dataclass(frozen=True)
class Limits:
    """Sizes of one engine, all of them too small."""

    capacity_tokens: int
    page_tokens: int
    rows: int
    budget: int


limits = st.builds(
    Limits,
    capacity_tokens=st.integers(6, 20).map(lambda units: units * 8),
    page_tokens=st.sampled_from([1, 4, 8]),
    rows=st.integers(1, 6),
    budget=st.integers(1, 64),
)


def play(engine: Engine, trace: list[Client]) -> None:
    """Let the clients come and go, checking every invariant at every step."""
    cancels: dict[int, list[tuple[int, int]]] = {}
    for number, client in enumerate(trace):
        new = request(
            number,
            client.prompt(number),
            max_tokens=client.max_tokens,
            min_tokens=client.min_tokens,
            n=client.n,
            priority=client.priority,
            prompt_logprobs=1 if number % 8 == 7 else None,
        )
        assert engine.add(new)
        if client.patience_steps is not None:
            due = engine.step + client.patience_steps
            cancels.setdefault(due, []).append((number, client.cancel_index))
        for _ in range(client.gap_steps):
            turn(engine, cancels)
    while engine.scheduler.has_work():
        turn(engine, cancels)
        assert engine.step < 20_000, "this does not end"


def turn(engine: Engine, cancels: dict[int, list[tuple[int, int]]]) -> None:
    for number, index in cancels.pop(engine.step, []):
        engine.cancel(number, index)
        engine.check()
    engine.turn()
    engine.check()


def run_trace(
    layout: str, in_flight: int, prefix_cache: bool, trace: list[Client], limits: Limits
) -> None:
    """Play `trace` and compare every answer with what the script prescribes."""
    kv = make_kv(
        layout,
        limits.capacity_tokens,
        page_tokens=limits.page_tokens,
        num_slots=limits.rows,
        prefix_cache=prefix_cache,
    )
    scheduler = make_scheduler(kv, rows=limits.rows, budget=limits.budget, in_flight=in_flight)
    stops = {i: client.stop_at for i, client in enumerate(trace) if client.stop_at is not None}
    block_tokens = limits.page_tokens if layout == "pages" else MAX_MODEL_LEN
    engine = Engine(kv, scheduler, block_tokens=block_tokens, in_flight=in_flight, stops=stops)

    play(engine, trace)

    for (number, index), answer in engine.answers.items():
        tokens, reason = trace[number].expected(number, index)
        if (number, index) in engine.cancelled:
            assert answer.token_ids == tokens[: len(answer.token_ids)]
        else:
            assert (answer.token_ids, answer.finish_reason) == (tokens, reason)
    assert kv.used_tokens == 0
    assert scheduler.num_running == scheduler.num_waiting == 0


every_engine = [
    pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"]),
    pytest.mark.parametrize("in_flight", [1, 2]),
    pytest.mark.parametrize("layout", ["pages", "slots"]),
]


def on_every_engine(test: Callable[..., None]) -> Callable[..., None]:
    for mark in every_engine:
        test = mark(test)
    return test


@on_every_engine
@settings(max_examples=50)
@given(trace=st.lists(clients, max_size=6), limits=limits)
def test_a_few_requests_get_exactly_their_own_tokens(
    layout: str, in_flight: int, prefix_cache: bool, trace: list[Client], limits: Limits
) -> None:
    run_trace(layout, in_flight, prefix_cache, trace, limits)


# Not shrunk: the test above finds small counterexamples, this one unlikely ones.
@on_every_engine
@settings(max_examples=NUM_EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(trace=st.lists(clients, min_size=NUM_REQUESTS, max_size=NUM_REQUESTS), limits=limits)
def test_ten_thousand_requests_get_exactly_their_own_tokens(
    layout: str, in_flight: int, prefix_cache: bool, trace: list[Client], limits: Limits
) -> None:
    run_trace(layout, in_flight, prefix_cache, trace, limits)


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("layout", ["pages", "slots"])
def test_a_stream_of_urgent_requests_delays_a_patient_one_by_its_aging_time_only(
    layout: str, in_flight: int
) -> None:
    aging_steps, priority = 4, 5
    kv = make_kv(layout, 32)
    scheduler = make_scheduler(kv, rows=2, in_flight=in_flight, aging_s=aging_steps * STEP_NS / 1e9)
    engine = Engine(
        kv, scheduler, block_tokens=4 if layout == "pages" else MAX_MODEL_LEN, in_flight=in_flight
    )
    engine.add(request(0, [7] * 10, max_tokens=12, priority=priority))
    for number in range(1, 400):  # one for each step: more than two rows can ever serve
        engine.add(request(number, [number] * 8, max_tokens=8))
        engine.turn()
        engine.check()

    answer = engine.answers[0, 0]
    assert answer.finish_reason == "length"
    # Due after five aging times. Those due before it, who arrived by then, all come first: two rows
    # and the cache end one of them every four to six steps.
    num_before = aging_steps * priority
    assert answer.end_step <= num_before * 6
    engine.run()
    assert all(answer.finish_reason for answer in engine.answers.values())
