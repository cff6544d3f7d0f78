"""Log probabilities of prompts and answers: those of transformers, and forgotten when reported."""

from __future__ import annotations

import msgspec
import pytest
import torch

from naiad.engine.messages import TokenLogprobs
from tests.engine import golden
from tests.engine.driving import (
    Setup,
    checkpoint,
    drive,
    first_outputs,
    greedy,
    is_empty,
    make_engine,
    request,
    run_out,
    tokens_of,
)

SHAPE = "llama-gqa"
PAGES, SLOTS = Setup(layout="pages"), Setup(ops="cpu", layout="slots")
both_layouts = pytest.mark.parametrize("setup", [PAGES, SLOTS], ids=str)


def wanted_logprobs(token_ids: list[int]) -> torch.Tensor:
    """`[tokens, vocab]`: of the successor of each token."""
    return golden.reference_logits(checkpoint(SHAPE), tuple(token_ids)).log_softmax(-1)


def wanted_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    return golden.reference_tokens(checkpoint(SHAPE), tuple(prompt), num_tokens)


def check_line(line: TokenLogprobs, row: torch.Tensor, token_id: int, num_top: int) -> None:
    """One reported position against the reference's distribution there."""
    best = row.topk(max(num_top, 1))
    assert line.token_id == token_id
    assert line.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
    assert line.rank == int((row > row[token_id]).sum()) + 1
    assert len(line.top_ids) == len(line.top_logprobs) == num_top
    assert line.top_ids == best.indices[:num_top].tolist()
    assert line.top_logprobs == pytest.approx(best.values[:num_top].tolist(), abs=1e-4)


def check_prompt_logprobs(
    lines: list[TokenLogprobs | None] | None, prompt: list[int], num_top: int
) -> None:
    assert lines is not None
    assert len(lines) == len(prompt)
    assert lines[0] is None
    rows = wanted_logprobs(prompt)
    for position, line in enumerate(lines[1:], start=1):
        assert line is not None
        check_line(line, rows[position - 1], prompt[position], num_top)


@both_layouts
def test_prompt_logprobs_are_those_of_transformers_at_every_position(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup)
    prompts = [tokens_of(0, 45), tokens_of(1, 2), tokens_of(2, 1)]
    tops = [3, 0, 20]
    requests = [
        (0, request(n, prompt, greedy(max_tokens=3, prompt_logprobs=top)))
        for n, (prompt, top) in enumerate(zip(prompts, tops, strict=True))
    ]

    found = first_outputs(drive(engine, requests))

    for number, (prompt, top) in enumerate(zip(prompts, tops, strict=True)):
        check_prompt_logprobs(found[number, 0].prompt_logprobs, prompt, top)
    assert is_empty(engine)


@both_layouts
def test_prompt_logprobs_come_from_chunks_among_decoding_neighbours(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, max_num_batched_tokens=9)
    prompt = tokens_of(0, 50)
    wants = request(1, prompt, greedy(max_tokens=4, prompt_logprobs=2))
    neighbour = request(0, tokens_of(1, 20), greedy(max_tokens=30))

    answers = drive(engine, [(0, neighbour), (3, wants)])

    assert answers.num_mixed_steps > 4
    check_prompt_logprobs(first_outputs(answers)[1, 0].prompt_logprobs, prompt, 2)
    assert is_empty(engine)


@both_layouts
def test_prompt_logprobs_are_whole_though_the_prompt_is_cached(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup)
    prompt = tokens_of(0, 50)
    drive(engine, [(0, request(0, prompt, greedy(max_tokens=4)))])

    wants = request(1, prompt, greedy(max_tokens=4, prompt_logprobs=1))
    answers = drive(engine, [(0, wants)])
    again = drive(engine, [(0, request(2, prompt, greedy(max_tokens=4)))])

    check_prompt_logprobs(first_outputs(answers)[1, 0].prompt_logprobs, prompt, 1)
    assert first_outputs(answers)[1, 0].prompt_cached_tokens == 0
    assert first_outputs(again)[2, 0].prompt_cached_tokens >= 48
    assert is_empty(engine)


@both_layouts
def test_prompt_logprobs_are_whole_and_forgotten_after_a_preemption(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, kv_cache_tokens=96, max_num_batched_tokens=32)
    prompts = [tokens_of(number, 20 - number) for number in range(4)]
    requests = [
        (0, request(number, prompt, greedy(max_tokens=24, prompt_logprobs=1)))
        for number, prompt in enumerate(prompts)
    ]

    answers = drive(engine, requests)

    assert answers.stats.num_preemptions > 0
    for number, prompt in enumerate(prompts):
        check_prompt_logprobs(first_outputs(answers)[number, 0].prompt_logprobs, prompt, 1)
        assert answers.tokens[number, 0] == wanted_tokens(prompt, 24)
    assert is_empty(engine)


@both_layouts
def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, kv_cache_tokens=96, max_num_batched_tokens=6)
    urgent = request(0, tokens_of(8, 60), greedy(max_tokens=10))
    prompt = tokens_of(0, 60)
    wants = request(1, prompt, greedy(max_tokens=4, prompt_logprobs=1))
    engine.submit(wants)
    for _ in range(4):
        assert not engine.step().outputs, "its prompt is not read yet"
    engine.submit(msgspec.structs.replace(urgent, priority=-5))

    answers = drive(engine, [])

    assert answers.stats.num_preemptions == 1
    check_prompt_logprobs(first_outputs(answers)[1, 0].prompt_logprobs, prompt, 1)
    assert is_empty(engine)


@both_layouts
def test_the_first_of_n_answers_reports_the_prompt_and_nothing_stays(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup, kv_cache_tokens=96)
    prompt = tokens_of(0, 30)
    sampling = greedy(max_tokens=20, n=3, prompt_logprobs=2)

    answers = drive(engine, [(0, request(0, prompt, sampling))])

    assert answers.stats.num_preemptions > 0, "answer 0 is computed again while others wait"
    first, *others = (first_outputs(answers)[0, index] for index in range(3))
    check_prompt_logprobs(first.prompt_logprobs, prompt, 2)
    assert [other.prompt_logprobs for other in others] == [None, None]
    assert is_empty(engine)


@both_layouts
@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
@pytest.mark.parametrize("indices", [[-1], [0], [1], [2, 0], [1, 2], [0, 1, 2]])
def test_cancelling_answers_keeps_nothing_of_the_prompt(
    setup: Setup, indices: list[int], num_steps: int
) -> None:
    engine = make_engine(SHAPE, setup, max_num_batched_tokens=8)
    engine.submit(
        request(0, tokens_of(0, 20), greedy(max_tokens=5, n=3, prompt_logprobs=0, logprobs=1))
    )
    for _ in range(num_steps):
        engine.step()
    for index in indices:
        engine.cancel(0, index)

    run_out(engine)

    assert is_empty(engine)


@both_layouts
def test_logprobs_are_those_of_transformers_each_row_with_its_own_number(setup: Setup) -> None:
    engine = make_engine(SHAPE, setup)
    tops = [0, 5, None, 20]
    requests = [
        (number, request(number, tokens_of(number, 12), greedy(max_tokens=9, logprobs=top)))
        for number, top in enumerate(tops)
    ]

    answers = drive(engine, requests)

    for number, top in enumerate(tops):
        prompt, said = tokens_of(number, 12), answers.tokens[number, 0]
        rows = wanted_logprobs(prompt + said)
        lines = [output.logprobs for output in answers.outputs if output.id == number]
        if top is None:
            assert set(map(type, lines)) == {type(None)}
            continue
        assert len(lines) == len(said) == 9
        for position, line in enumerate(lines):
            assert line is not None
            assert len(line) == 1
            check_line(line[0], rows[len(prompt) - 1 + position], said[position], top)


def test_logprobs_are_of_the_distribution_before_any_parameter() -> None:
    engine = make_engine(SHAPE, SLOTS)
    prompt = tokens_of(0, 15)
    sampling = greedy(
        max_tokens=8,
        temperature=2.0,
        top_k=50,
        logit_bias={7: 5.0},
        frequency_penalty=1.0,
        seed=3,
        logprobs=4,
    )

    answers = drive(engine, [(0, request(0, prompt, sampling))])

    said = answers.tokens[0, 0]
    assert said != wanted_tokens(prompt, 8)
    rows = wanted_logprobs(prompt + said)
    for position, output in enumerate(answers.outputs):
        assert output.logprobs is not None
        check_line(output.logprobs[0], rows[14 + position], said[position], 4)
