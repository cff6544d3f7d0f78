"""The scheduling rules, one by one, on a clock the test owns."""

from __future__ import annotations

import pytest

from naiad.core.errors import InvalidRequest, QueueFull
from naiad.engine.kv.pages import PageManager
from naiad.engine.scheduler.base import StepPlan
from naiad.engine.scheduler.planner import Scheduler
from naiad.engine.scheduler.sequence import State
from tests.engine.scheduler.simulation import STOP_TOKEN, make_kv, make_scheduler, request

A, B, C = [10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]


def next_plan(scheduler: Scheduler, now_ns: int = 0) -> StepPlan:
    plan = scheduler.plan(now_ns)
    assert plan is not None
    return plan


def rows(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """Request, start, number of tokens and whether it samples, for each row."""
    return [(row.sequence.request.id, row.start, row.num_tokens, row.samples) for row in plan.rows]


def admitted(plan: StepPlan) -> list[int]:
    return [sequence.request.id for sequence in plan.admitted]


def step(scheduler: Scheduler, token: int = 1) -> list[tuple[int, list[int], str | None]]:
    """Plan, commit `token` for every row that samples, and say what the clients hear."""
    return commit(scheduler, next_plan(scheduler), token)


def commit(
    scheduler: Scheduler, plan: StepPlan, token: int = 1
) -> list[tuple[int, list[int], str | None]]:
    sampled = [token] * sum(row.samples for row in plan.rows)
    return [
        (update.sequence.request.id, update.token_ids, update.finish_reason)
        for update in scheduler.commit(plan, sampled, now_ns=0)
    ]


def with_pages(num_tokens: int = 256, **limits: int) -> Scheduler:
    return make_scheduler(PageManager(num_tokens // 4, 4), **limits)


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = with_pages()

    assert scheduler.plan(0) is None
    assert not scheduler.has_work()


def test_a_prompt_is_computed_first_and_then_one_token_at_a_time() -> None:
    scheduler = with_pages()
    scheduler.add(request(0, A, max_tokens=2), 0)

    first = next_plan(scheduler)
    assert rows(first) == [(0, 0, 4, True)]
    assert admitted(first) == [0]
    assert commit(scheduler, first, token=5) == [(0, [5], None)]

    second = next_plan(scheduler)
    assert rows(second) == [(0, 4, 1, True)]
    assert admitted(second) == []
    assert commit(scheduler, second, token=6) == [(0, [6], "length")]
    assert not scheduler.has_work()


def test_a_long_prompt_is_cut_into_chunks_that_fit_the_budget() -> None:
    scheduler = with_pages(budget=3)
    scheduler.add(request(0, list(range(8))), 0)

    chunk = next_plan(scheduler)
    assert rows(chunk) == [(0, 0, 3, False)]
    assert commit(scheduler, chunk) == [(0, [], None)]
    assert step(scheduler) == [(0, [], None)]
    assert rows(next_plan(scheduler)) == [(0, 6, 2, True)]


def test_decode_rows_come_before_chunks_of_older_prompts() -> None:
    scheduler = with_pages(budget=8)
    scheduler.add(request(0, list(range(20))), 0)
    scheduler.add(request(1, A, priority=-1), 0)
    step(scheduler)  # 1 whole, 4 tokens of 0

    assert rows(next_plan(scheduler)) == [(1, 4, 1, True), (0, 4, 7, False)]


def test_urgent_requests_start_first_and_equals_in_order_of_arrival() -> None:
    scheduler = with_pages(rows=3)
    for number, priority in enumerate([1, 0, 0, -1]):
        scheduler.add(request(number, [number] * 4, priority=priority), number)

    assert admitted(next_plan(scheduler, 9)) == [3, 1, 2]


def test_waiting_one_aging_time_is_worth_one_priority() -> None:
    scheduler = with_pages(rows=1, aging_s=10)
    scheduler.add(request(0, A, priority=1), 0)
    scheduler.add(request(1, B, priority=0), 10_000_000_001)

    assert admitted(next_plan(scheduler, 10_000_000_001)) == [0]


def test_a_stop_token_ends_the_answer_and_is_part_of_it() -> None:
    scheduler = with_pages()
    scheduler.add(request(0, A, max_tokens=9), 0)

    plan = next_plan(scheduler)
    (update,) = scheduler.commit(plan, [STOP_TOKEN], 0)

    assert (update.token_ids, update.finish_reason) == ([STOP_TOKEN], "stop")
    assert update.stop_token_id == STOP_TOKEN


def test_a_stop_token_before_min_tokens_does_not_end_the_answer() -> None:
    scheduler = with_pages()
    scheduler.add(request(0, A, max_tokens=9, min_tokens=1), 0)

    assert step(scheduler, STOP_TOKEN) == [(0, [STOP_TOKEN], None)]
    assert step(scheduler, STOP_TOKEN) == [(0, [STOP_TOKEN], "stop")]


def test_a_repeated_prompt_computes_only_what_is_not_cached() -> None:
    scheduler = with_pages()
    scheduler.add(request(0, A + B, max_tokens=1), 0)
    step(scheduler)
    scheduler.add(request(1, A + B + C, max_tokens=1), 0)

    assert rows(next_plan(scheduler)) == [(1, 8, 4, True)]
    assert (scheduler.num_prefix_query_tokens, scheduler.num_prefix_hit_tokens) == (20, 8)


def test_prompt_logprobs_need_every_token_computed() -> None:
    scheduler = with_pages()
    scheduler.add(request(0, A + B, max_tokens=1), 0)
    step(scheduler)
    scheduler.add(request(1, A + B, max_tokens=1, prompt_logprobs=0), 0)

    assert rows(next_plan(scheduler)) == [(1, 0, 8, True)]


@pytest.mark.parametrize("layout", ["pages", "slots"])
def test_further_answers_start_from_the_prompt_of_the_first(layout: str) -> None:
    scheduler = make_scheduler(make_kv(layout))
    scheduler.add(request(0, [*A, 5, 6], n=3), 0)

    prompt = next_plan(scheduler)
    assert rows(prompt) == [(0, 0, 6, True)]
    assert scheduler.num_waiting == 2
    commit(scheduler, prompt)

    plan = next_plan(scheduler)
    # The first decodes at 6; the others compute the last token of the prompt, each for itself.
    assert rows(plan) == [(0, 6, 1, True), (0, 5, 1, True), (0, 5, 1, True)]
    assert [row.sequence.index for row in plan.rows] == [0, 1, 2]
    assert [copy.num_tokens for copy in plan.copies] == ([1, 1] if layout == "pages" else [5, 5])


def test_further_answers_start_without_the_first_if_it_has_ended() -> None:
    scheduler = make_scheduler(make_kv("pages", prefix_cache=False))
    scheduler.add(request(0, A, n=2, max_tokens=1), 0)
    assert step(scheduler) == [(0, [1], "length")]

    assert rows(next_plan(scheduler)) == [(0, 0, 4, True)]


@pytest.mark.parametrize("layout", ["pages", "slots"])
def test_the_newest_running_sequence_gives_way_when_the_cache_is_full(layout: str) -> None:
    scheduler = make_scheduler(make_kv(layout, 12, page_tokens=1, prefix_cache=False))
    scheduler.add(request(0, A, max_tokens=8), 0)
    scheduler.add(request(1, B, max_tokens=8), 0)
    for _ in range(3):  # 4 + 2 places each, then there is none for a seventh token
        step(scheduler)

    plan = next_plan(scheduler)
    assert rows(plan) == [(0, 6, 1, True)]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    commit(scheduler, plan)
    while scheduler.num_running:
        assert {number for number, _, _ in step(scheduler)} == {0}
    # The older one has ended. The other is computed again, what it had said included.
    assert rows(next_plan(scheduler)) == [(1, 0, 7, True)]


def test_an_urgent_request_takes_the_row_of_a_less_urgent_one_in_the_same_step() -> None:
    scheduler = with_pages(rows=1)
    scheduler.add(request(0, A, priority=1), 0)
    step(scheduler)
    scheduler.add(request(1, B, priority=0), 1)

    assert rows(next_plan(scheduler, 1)) == [(1, 0, 4, True)]
    assert scheduler.num_preemptions == 1


def test_an_equally_urgent_request_waits() -> None:
    scheduler = with_pages(rows=1)
    scheduler.add(request(0, A), 0)
    step(scheduler)
    scheduler.add(request(1, B), 1)

    assert rows(next_plan(scheduler, 1)) == [(0, 4, 1, True)]


def test_one_who_has_waited_long_is_not_preempted_by_a_newcomer() -> None:
    scheduler = with_pages(rows=1, aging_s=10)
    scheduler.add(request(0, A, priority=1), 0)
    step(scheduler)
    scheduler.add(request(1, B, priority=0), 10_000_000_001)

    assert rows(next_plan(scheduler, 10_000_000_001)) == [(0, 4, 1, True)]


def test_a_cancelled_request_frees_its_row_and_pages_at_once() -> None:
    kv = make_kv("pages")
    scheduler = make_scheduler(kv)
    scheduler.add(request(0, A), 0)
    step(scheduler)

    (ended,) = scheduler.cancel(0)

    assert (ended.state, ended.row) == (State.FINISHED, -1)
    assert kv.used_tokens == 0
    assert not scheduler.has_work()
    assert scheduler.cancel(0) == []


def test_a_request_cancelled_during_its_step_frees_its_pages_with_the_commit() -> None:
    kv = make_kv("pages")
    scheduler = make_scheduler(kv)
    scheduler.add(request(0, A), 0)
    plan = next_plan(scheduler)

    scheduler.cancel(0)
    assert kv.used_tokens == 4
    assert scheduler.has_work()
    assert commit(scheduler, plan) == []
    assert kv.used_tokens == 0
    assert not scheduler.has_work()


def test_one_answer_can_be_cancelled_alone() -> None:
    scheduler = with_pages()
    scheduler.add(request(0, A, n=2), 0)
    step(scheduler)

    assert [sequence.index for sequence in scheduler.cancel(0, index=0)] == [0]
    assert [row.sequence.index for row in next_plan(scheduler).rows] == [1]


def test_the_next_token_is_planned_before_the_last_is_known() -> None:
    scheduler = with_pages(in_flight=2)
    scheduler.add(request(0, A, max_tokens=3), 0)

    first, second = next_plan(scheduler), next_plan(scheduler)

    assert rows(first) == [(0, 0, 4, True)]
    assert rows(second) == [(0, 4, 1, True)]
    assert scheduler.plan(0) is None  # two are in flight
    assert commit(scheduler, first, token=5) == [(0, [5], None)]
    assert rows(next_plan(scheduler)) == [(0, 5, 1, True)]


def test_nothing_is_planned_beyond_max_tokens() -> None:
    scheduler = with_pages(in_flight=2)
    scheduler.add(request(0, A, max_tokens=1), 0)

    assert rows(next_plan(scheduler)) == [(0, 0, 4, True)]
    assert scheduler.plan(0) is None


def test_what_was_planned_beyond_a_stop_token_is_dropped() -> None:
    kv = make_kv("pages")
    scheduler = make_scheduler(kv, in_flight=2)
    scheduler.add(request(0, A, max_tokens=9), 0)
    first, second = next_plan(scheduler), next_plan(scheduler)

    assert commit(scheduler, first, STOP_TOKEN) == [(0, [STOP_TOKEN], "stop")]
    assert kv.used_tokens == 8  # the second step still writes there
    assert commit(scheduler, second) == []
    assert kv.used_tokens == 0


def test_a_full_queue_refuses_and_says_how_full() -> None:
    scheduler = with_pages(queue=1, rows=1)
    scheduler.add(request(0, A), 0)
    step(scheduler)  # running, so it does not count
    scheduler.add(request(1, B, n=2), 0)  # a request, however many answers

    with pytest.raises(QueueFull, match="1 requests are waiting") as refusal:
        scheduler.add(request(2, C), 0)
    assert refusal.value.facts == {"limit": 1, "retry_after_s": 1.0}
    scheduler.cancel(1)
    scheduler.add(request(2, C), 0)


def test_prompts_that_wait_are_bounded_by_their_tokens_too() -> None:
    scheduler = with_pages(queue_tokens=2 * len(A), rows=1)
    scheduler.add(request(0, A), 0)
    step(scheduler)  # running, so it does not count
    scheduler.add(request(1, A, n=3), 0)  # once, however many answers
    scheduler.add(request(2, A), 0)

    with pytest.raises(QueueFull, match=rf"{2 * len(A)} prompt tokens wait") as refusal:
        scheduler.add(request(3, [1]), 0)
    assert refusal.value.facts == {"limit": 2 * len(A), "retry_after_s": 1.0}
    scheduler.cancel(1)
    scheduler.add(request(3, [1]), 0)


def test_a_prompt_longer_than_may_wait_is_taken_if_nobody_waits() -> None:
    scheduler = with_pages(queue_tokens=2, rows=1)
    scheduler.add(request(0, A), 0)
    step(scheduler)

    scheduler.add(request(1, A), 0)
    with pytest.raises(QueueFull):
        scheduler.add(request(2, [1]), 0)


def test_answers_share_their_prompt_until_they_start() -> None:
    scheduler = with_pages(rows=2)
    shared = request(0, A, n=4)
    scheduler.add(shared, 0)
    sequences = [sequence for answers in scheduler._requests.values() for sequence in answers]

    assert all(sequence.token_ids is shared.prompt_token_ids for sequence in sequences)
    step(scheduler)
    step(scheduler)
    started = [sequence.index for sequence in sequences if sequence.token_ids != A]
    assert started == [0, 1]
    assert shared.prompt_token_ids == A, "nobody writes into what is shared"


def test_requests_that_free_rows_will_take_do_not_count_as_waiting() -> None:
    scheduler = with_pages(queue=1, rows=2)
    for number in range(3):  # two rows and one place in the queue, before any step
        scheduler.add(request(number, A), 0)

    with pytest.raises(QueueFull):
        scheduler.add(request(3, B), 0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "text"),
    [
        ([], 1, "the prompt is empty"),
        ([1] * 40, 9, "prompt of 40 tokens .* 9 = 49 exceed the model's context of 48 tokens"),
        ([1] * 30, 9, "prompt of 30 tokens .* 9 = 39 exceed the KV cache of 32 tokens"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(
    prompt: list[int], max_tokens: int, text: str
) -> None:
    scheduler = make_scheduler(make_kv("pages", 32))

    with pytest.raises(InvalidRequest, match=text) as refusal:
        scheduler.add(request(0, prompt, max_tokens=max_tokens), 0)
    assert refusal.value.hint
    assert not scheduler.has_work()


def test_after_a_failed_step_nothing_is_left_and_nothing_is_believed() -> None:
    kv = make_kv("pages")
    scheduler = make_scheduler(kv, in_flight=2, rows=2)
    for number in range(3):
        scheduler.add(request(number, A, max_tokens=9), 0)
    first = next_plan(scheduler)
    next_plan(scheduler)
    commit(scheduler, first)
    scheduler.cancel(1)

    assert sorted(sequence.request.id for sequence in scheduler.fail_all()) == [0, 2]

    assert not scheduler.has_work()
    assert kv.used_tokens == 0
    kv.check()
    scheduler.add(request(3, A), 0)
    assert rows(next_plan(scheduler)) == [(3, 0, 4, True)]
