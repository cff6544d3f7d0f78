"""What an engine says to its requests: ends, refusals, failures and its counters."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from naiad.core.clock import VirtualClock
from naiad.core.errors import InternalError
from naiad.engine import admission
from naiad.engine.engine import Engine
from naiad.engine.runner import Runner
from tests.engine import golden
from tests.engine.broken_engine import BrokenRunner
from tests.engine.driving import (
    Setup,
    checkpoint,
    drive,
    first_outputs,
    greedy,
    is_empty,
    last_outputs,
    make_engine,
    request,
    run_out,
    tokens_of,
)

SHAPE = "llama-gqa"
SECOND = 10**9
PAGES, SLOTS = Setup(layout="pages"), Setup(ops="cpu", layout="slots")
both_layouts = pytest.mark.parametrize("setup", [PAGES, SLOTS], ids=str)


def wanted_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    return golden.reference_tokens(checkpoint(SHAPE), tuple(prompt), num_tokens)


# ---------------------------------------------------------------- how answers end


@both_layouts
def test_a_stop_token_ends_an_answer_and_is_reported(setup: Setup) -> None:
    prompt = tokens_of(0, 20)
    said = wanted_tokens(prompt, 12)
    stop = next(token for n, token in enumerate(said) if n >= 4 and token not in said[:n])
    engine = make_engine(SHAPE, setup)
    stopping = greedy(max_tokens=12, stop_token_ids=(stop, 1))

    answers = drive(engine, [(0, request(0, prompt, stopping))])

    last = last_outputs(answers)[0, 0]
    assert answers.tokens[0, 0] == said[: said.index(stop) + 1], "the stop token is included"
    assert (last.finish_reason, last.stop_token_id) == ("stop", stop)
    assert is_empty(engine)


def test_without_stop_tokens_an_answer_ends_by_its_length() -> None:
    prompt = tokens_of(0, 20)
    answers = drive(make_engine(SHAPE, SLOTS), [(0, request(0, prompt, greedy(max_tokens=12)))])

    last = last_outputs(answers)[0, 0]
    assert answers.tokens[0, 0] == wanted_tokens(prompt, 12)
    assert (last.finish_reason, last.stop_token_id) == ("length", None)


@both_layouts
def test_min_tokens_puts_off_the_stop_token(setup: Setup) -> None:
    prompt = tokens_of(0, 20)
    first = wanted_tokens(prompt, 1)[0]
    engine = make_engine(SHAPE, setup)

    def said(min_tokens: int) -> list[int]:
        sampling = greedy(max_tokens=30, min_tokens=min_tokens, stop_token_ids=(first,))
        return drive(engine, [(0, request(0, prompt, sampling))]).tokens[0, 0]

    assert said(0) == [first]
    for min_tokens in (1, 7):
        answer = said(min_tokens)
        assert first not in answer[:min_tokens]
        assert len(answer) > min_tokens


def test_stop_tokens_of_one_row_do_not_stop_another() -> None:
    prompt = tokens_of(0, 20)
    said = wanted_tokens(prompt, 10)
    requests = [
        (0, request(0, prompt, greedy(max_tokens=10, stop_token_ids=(said[2],)))),
        (0, request(1, prompt, greedy(max_tokens=10))),
        (0, request(2, prompt, greedy(max_tokens=10, stop_token_ids=(said[0],), min_tokens=1))),
    ]

    answers = drive(make_engine(SHAPE, SLOTS), requests)

    assert answers.tokens[0, 0] == said[: said.index(said[2]) + 1]
    assert answers.tokens[1, 0] == said


@both_layouts
def test_each_answer_is_drawn_with_its_own_seed(setup: Setup) -> None:
    engine, prompt = make_engine(SHAPE, setup), tokens_of(0, 20)
    drawn = greedy(max_tokens=8, temperature=1.0, seed=7)

    together = drive(engine, [(0, request(0, prompt, msgspec.structs.replace(drawn, n=3)))])

    for index in range(3):
        alone = msgspec.structs.replace(drawn, seed=7 + index)
        said = drive(engine, [(0, request(0, prompt, alone))]).tokens[0, 0]
        assert together.tokens[0, index] == said
    assert len({tuple(said) for said in together.tokens.values()}) == 3


def test_times_come_with_the_first_and_the_last_tokens() -> None:
    engine = make_engine(SHAPE, SLOTS)
    answers = drive(engine, [(0, request(0, tokens_of(0, 5), greedy(max_tokens=4, n=2)))])

    for index in range(2):
        outputs = [output for output in answers.outputs if output.index == index]
        first, *middle, last = outputs
        assert 0 < first.first_scheduled_ns <= first.first_token_ns
        assert all(output.first_scheduled_ns == 0 for output in middle)
        assert last.first_scheduled_ns == first.first_scheduled_ns
        assert last.first_token_ns == first.first_token_ns


# ---------------------------------------------------------------- cancelling and order


@both_layouts
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 9])
def test_a_cancelled_request_frees_its_cache_at_once_and_says_no_more(
    setup: Setup, num_steps: int
) -> None:
    engine = make_engine(SHAPE, setup, max_num_batched_tokens=16)
    engine.submit(request(0, tokens_of(0, 40), greedy(max_tokens=50, n=2)))
    for _ in range(num_steps):
        engine.step()

    engine.cancel(0)

    assert engine._kv.used_tokens == 0
    assert not engine.has_work()
    assert engine.step().outputs == []
    assert is_empty(engine)
    engine.check()


@both_layouts
def test_cancelling_one_leaves_its_neighbours_as_they_were(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup)
    prompts = [tokens_of(number, 20 + number) for number in range(3)]
    for number, prompt in enumerate(prompts):
        engine.submit(request(number, prompt, greedy(max_tokens=15)))
    said: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number in range(30):
        if number == 6:
            engine.cancel(1)
            engine.cancel(77)
        for output in engine.step().outputs:
            said[output.id] += output.token_ids

    assert len(said[1]) == 6
    assert said[0] == wanted_tokens(prompts[0], 15)
    assert said[2] == wanted_tokens(prompts[2], 15)
    assert is_empty(engine)


def test_waiting_requests_start_by_priority_then_by_arrival() -> None:
    engine = make_engine(SHAPE, SLOTS, max_num_seqs=1)
    order = []
    for number, priority in enumerate([-9, 2, 0, 1, 0, -1]):
        one = request(number, tokens_of(number, 5), greedy(max_tokens=2))
        engine.submit(msgspec.structs.replace(one, priority=priority))
    for step in run_out(engine):
        order += [output.id for output in step.outputs if output.finish_reason]

    assert order == [0, 5, 2, 4, 3, 1]


def test_whoever_has_waited_long_starts_before_a_more_urgent_newcomer() -> None:
    clock = VirtualClock()
    engine = make_engine(SHAPE, SLOTS, max_num_seqs=1, clock=clock)

    def submit(number: int, priority: int) -> None:
        one = request(number, tokens_of(number, 5), greedy(max_tokens=2))
        engine.submit(msgspec.structs.replace(one, priority=priority))

    submit(0, 0)
    asyncio.run(clock.advance_to(5 * SECOND))
    submit(1, -1)  # as if it had come 10 s before
    asyncio.run(clock.advance_to(11 * SECOND))
    submit(2, -1)
    outputs = [output for step in run_out(engine) for output in step.outputs]

    assert [output.id for output in outputs if output.finish_reason] == [1, 0, 2]
    assert {output.first_token_ns for output in outputs} == {11 * SECOND}


@both_layouts
def test_a_running_request_gives_its_row_to_an_urgent_one_and_loses_no_token(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, max_num_seqs=1)
    patient, urgent = tokens_of(0, 20), tokens_of(1, 10)
    late = msgspec.structs.replace(request(1, urgent, greedy(max_tokens=4)), priority=-1)

    answers = drive(engine, [(0, request(0, patient, greedy(max_tokens=12))), (5, late)])

    assert answers.stats.num_preemptions == 1
    assert [output.id for output in answers.outputs if output.finish_reason] == [1, 0]
    assert answers.tokens[0, 0] == wanted_tokens(patient, 12)
    assert answers.tokens[1, 0] == wanted_tokens(urgent, 4)


# ---------------------------------------------------------------- refusals and failures


def refusals(engine: Engine) -> dict[int, tuple[str, str]]:
    """Kind and message by request id, of one step."""
    return {r.id: (r.error.kind, r.error.message) for r in engine.step().rejected}


def test_requests_that_can_never_run_are_rejected_by_the_next_step() -> None:
    engine = make_engine(SHAPE, SLOTS, max_model_len=64)
    engine.submit(request(1, [], greedy(max_tokens=1)))
    engine.submit(request(2, tokens_of(0, 60), greedy(max_tokens=5)))
    engine.submit(request(3, tokens_of(0, 5), greedy(max_tokens=2)))
    engine.submit(request(3, tokens_of(0, 5), greedy(max_tokens=2)))

    assert engine.has_work()
    found = refusals(engine)

    assert found[1] == ("invalid", "the prompt is empty")
    assert found[2][0] == "invalid"
    assert "60 tokens + max_tokens 5 = 65 exceed the model's context of 64" in found[2][1]
    assert found[3] == ("invalid", "request id 3 is in use")
    assert sum(len(step.outputs) for step in run_out(engine)) == 1, "the first 3 is served"
    assert is_empty(engine)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([5, 512], {}),
        ([-1], {}),
        ([5], {"logit_bias": {512: 1.0}}),
        ([5], {"logit_bias": {-1: 1.0}}),
        ([5], {"stop_token_ids": (600,), "min_tokens": 2}),
    ],
)
def test_ids_outside_the_vocabulary_harm_only_their_own_request(
    prompt: list[int], options: dict[str, Any]
) -> None:
    engine = make_engine(SHAPE, SLOTS)
    good = tokens_of(0, 10)
    engine.submit(request(0, good, greedy(max_tokens=6)))
    engine.submit(request(1, prompt, greedy(max_tokens=6, **options)))
    said: list[int] = []
    rejected = []
    for step in run_out(engine):
        rejected += step.rejected
        said += [token for out in step.outputs for token in out.token_ids if out.id == 0]

    assert said == wanted_tokens(good, 6)
    assert [(r.id, r.error.kind) for r in rejected] == [(1, "invalid")]
    assert "512" in rejected[0].error.message


@pytest.mark.parametrize(
    ("num_tokens", "sampling", "message"),
    [
        (100, {"prompt_logprobs": 20}, "20 prompt_logprobs for 100 prompt tokens are 2100 values"),
        (5, {"logit_bias": dict.fromkeys(range(51), 1.0)}, "logit_bias has 51 entries"),
        (5, {"stop_token_ids": tuple(range(41))}, "stop_token_ids has 41 entries"),
    ],
)
def test_what_would_burden_everybodys_steps_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, sampling: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(admission, "MAX_PROMPT_LOGPROBS", 2099)
    monkeypatch.setattr(admission, "MAX_LOGIT_BIAS", 50)
    monkeypatch.setattr(admission, "MAX_STOP_TOKEN_IDS", 40)
    engine = make_engine(SHAPE, SLOTS)
    engine.submit(request(0, tokens_of(0, num_tokens), greedy(max_tokens=1, **sampling)))

    ((kind, said),) = refusals(engine).values()

    assert kind == "invalid"
    assert message in said
    assert is_empty(engine)


def test_one_more_than_may_wait_is_rejected_as_overloaded() -> None:
    engine = make_engine(SHAPE, SLOTS, max_queued_requests=2, max_num_seqs=1)
    for number in range(5):  # one takes the free row
        engine.submit(request(number, tokens_of(number, 5), greedy(max_tokens=2)))

    step = engine.step()

    assert [rejected.id for rejected in step.rejected] == [3, 4]
    assert step.rejected[0].error.kind == "overloaded"
    assert step.rejected[0].error.facts["limit"] == 2
    assert step.rejected[0].error.facts["retry_after_s"] > 0
    run_out(engine)
    assert is_empty(engine)


class FailingRunner:
    """A runner that fails its `nth` step, after the cache has been written, and then recovers."""

    def __init__(self, runner: Runner, nth: int) -> None:
        self._runner, self._left = runner, nth

    def run(self, *arguments: Any) -> Any:
        self._left -= 1
        result = self._runner.run(*arguments)
        if self._left == 0:
            raise RuntimeError("the device fell over")
        return result


@both_layouts
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_step_that_raises_rejects_what_was_there_and_the_engine_goes_on(
    setup: Setup, nth: int
) -> None:
    engine = make_engine(SHAPE, setup, max_num_batched_tokens=24, max_num_seqs=2)
    engine._runner = FailingRunner(engine._runner, nth)  # type: ignore[assignment]
    prompts = [tokens_of(number, 30) for number in range(3)]
    for number, prompt in enumerate(prompts):
        sampling = greedy(max_tokens=6, n=1 + number % 2, prompt_logprobs=1)
        engine.submit(request(number, prompt, sampling))
    for _ in range(nth):
        step = engine.step()

    assert [rejected.id for rejected in step.rejected] == [0, 1, 2]
    assert {rejected.error.kind for rejected in step.rejected} == {"internal"}
    assert "RuntimeError: the device fell over" in step.rejected[0].error.message
    assert is_empty(engine)
    engine.check()

    again = drive(engine, [(0, request(0, prompts[0], greedy(max_tokens=6)))])
    assert again.tokens[0, 0] == wanted_tokens(prompts[0], 6)
    assert first_outputs(again)[0, 0].prompt_cached_tokens == 0, "the cache is not trusted"


def test_a_step_that_works_between_failures_shows_that_the_device_does() -> None:
    engine = make_engine(SHAPE, SLOTS)
    works = engine._runner
    for number in range(5):
        engine._runner = BrokenRunner()  # type: ignore[assignment]
        engine.submit(request(number, [5], greedy(max_tokens=1)))
        assert [rejected.id for rejected in engine.step().rejected] == [number]
        engine.cancel(number)
        assert engine.step().rejected == []
        engine._runner = works
        assert drive(engine, [(0, request(9, [5], greedy(max_tokens=1)))]).tokens[9, 0]


def test_an_engine_whose_every_step_failed_says_so_and_works_no_more() -> None:
    engine = make_engine(SHAPE, SLOTS)
    engine._runner = BrokenRunner()  # type: ignore[assignment]
    for number in range(2):
        assert not engine.step().rejected, "nothing to run, which says nothing of the device"
        engine.submit(request(number, [5], greedy(max_tokens=1)))
        assert [rejected.id for rejected in engine.step().rejected] == [number]

    assert engine.has_work(), "it waits for nobody to say that it is broken"
    with pytest.raises(InternalError, match=r"2 steps in a row failed.*the device is gone"):
        engine.step()


# ---------------------------------------------------------------- counters


@both_layouts
def test_counters_add_up(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, max_num_batched_tokens=16)
    requests = [
        (number, request(number, tokens_of(number, 10 + number), greedy(max_tokens=5, n=2)))
        for number in range(3)
    ]

    answers = drive(engine, requests)

    stats = answers.stats
    assert stats.num_prompt_tokens == 10 + 11 + 12, "a prompt counts once, however many answers"
    assert stats.num_generated_tokens == 3 * 2 * 5
    assert stats.num_generated_tokens == sum(map(len, answers.tokens.values()))
    assert stats.num_steps > 5
    assert stats.num_running == stats.num_waiting == stats.kv_usage == 0
    assert is_empty(engine)


def test_what_runs_and_waits_shows_in_the_step_that_tells_of_it() -> None:
    engine = make_engine(SHAPE, SLOTS, max_num_seqs=2, kv_cache_tokens=100, prefix_cache=False)
    for number in range(3):
        engine.submit(request(number, tokens_of(number, 20), greedy(max_tokens=3)))

    stats = engine.step().stats

    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert stats.num_step_tokens == 40
    assert stats.kv_usage == pytest.approx(0.4)
    assert stats.num_prefix_queries_tokens == 40
    engine.close()
    assert is_empty(engine)


@both_layouts
def test_many_requests_leave_nothing_behind(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, max_num_seqs=8)
    for start in range(0, 200, 8):
        for number in range(start, start + 8):
            options: dict[str, Any] = {"n": 1 + number % 3, "temperature": float(number % 2)}
            if number % 4 == 0:
                options |= {"prompt_logprobs": 0, "logprobs": 1}
            prompt = tokens_of(number % 5, 3 + number % 20)
            engine.submit(request(number, prompt, greedy(max_tokens=1 + number % 3, **options)))
        for step in run_out(engine):
            assert not step.rejected

    assert is_empty(engine)
