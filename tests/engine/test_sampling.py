"""Every sampling parameter against a slow, obvious reference, and the draw against its distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from naiad.engine import sampling
from naiad.engine.messages import EngineSampling
from naiad.engine.rows import Draw, RowTable
from naiad.engine.sampling import SamplingBatch, logprobs, sample, uniforms

CPU = torch.device("cpu")
NEVER = float("-inf")


def random_logits(seed: int, rows: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def params(**options: Any) -> EngineSampling:
    return EngineSampling(**({"max_tokens": 100, "seed": 0} | options))


def draw_tokens(
    logits: torch.Tensor,
    samplings: list[EngineSampling],
    histories: list[list[int]] | None = None,
    num_prompt: int = 1,
) -> torch.Tensor:
    """Draw one token per row through the table of rows, as the engine does."""
    rows = RowTable(len(samplings), logits.shape[1], CPU)
    for number, one in enumerate(samplings):
        rows.set(number, one, 0)
    histories = histories or [[0] for _ in samplings]
    draws = [Draw(number, history, num_prompt) for number, history in enumerate(histories)]
    return sample(logits, rows.batch(draws))


def support(logits: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    """Which tokens of each row the filters leave, `[rows, vocab]` bool."""
    batch = SamplingBatch(num_rows=len(logits), **options)  # type: ignore[arg-type]
    return sampling._filter(logits.clone(), batch) > NEVER


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def warped(processor: LogitsProcessor, logits: torch.Tensor) -> torch.Tensor:
    """What one of transformers' processors makes of the logits."""
    found: torch.Tensor = processor(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())
    return found


seeds = st.integers(0, 10_000)

# ---------------------------------------------------------------- filters


@given(seed=seeds, k=st.integers(1, 70))
@settings(max_examples=30)
def test_top_k_keeps_what_transformers_keeps(seed: int, k: int) -> None:
    logits = random_logits(seed, 3, 60)

    kept = support(logits, top_k=torch.full((3, 1), k))

    assert torch.equal(kept, warped(TopKLogitsWarper(k), logits) > NEVER)


@given(seed=seeds, p=st.floats(0.01, 1.0, exclude_max=True), spread=st.sampled_from([0.1, 1, 5]))
@settings(max_examples=50)
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float, spread: float) -> None:
    logits = random_logits(seed, 3, 60, spread)

    kept = support(logits, top_p=column(p, p, p))

    for row, mask in zip(logits.double().softmax(-1).tolist(), kept.tolist(), strict=True):
        chosen = sorted(
            (prob for prob, inside in zip(row, mask, strict=True) if inside), reverse=True
        )
        assert chosen == sorted(row, reverse=True)[: len(chosen)], "the most likely ones"
        assert sum(chosen) >= p - 1e-5
        assert sum(chosen[:-1]) < p + 1e-5, "no smaller set does"


@given(seed=seeds, p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99]))
@settings(max_examples=30)
def test_top_p_keeps_what_transformers_keeps(seed: int, p: float) -> None:
    logits = random_logits(seed, 3, 200)

    assert torch.equal(
        support(logits, top_p=column(p, p, p)), warped(TopPLogitsWarper(p), logits) > NEVER
    )


@given(seed=seeds, p=st.floats(0.001, 1.0))
@settings(max_examples=30)
def test_min_p_keeps_what_transformers_keeps(seed: int, p: float) -> None:
    logits = random_logits(seed, 3, 60)

    kept = support(logits, min_p=column(p, p, p))

    theirs = warped(MinPLogitsWarper(p), logits) > NEVER
    relative = logits.softmax(-1) / logits.softmax(-1).amax(-1, keepdim=True)
    certain = (relative - p).abs() > 1e-6  # a rounding may decide a tie
    assert torch.equal(kept & certain, theirs & certain)
    assert bool(kept.any(-1).all())


def test_every_row_has_its_own_filters_and_neutral_rows_keep_everything() -> None:
    logits = random_logits(0, 1, 50).repeat(4, 1)

    kept = support(
        logits,
        top_k=torch.tensor([[0], [5], [0], [0]]),
        top_p=column(1.0, 1.0, 0.5, 1.0),
        min_p=column(0.0, 0.0, 0.0, 0.5),
    )

    assert bool(kept[0].all())
    assert torch.equal(kept[1:2], support(logits[:1], top_k=torch.tensor([[5]])))
    assert torch.equal(kept[2:3], support(logits[:1], top_p=column(0.5)))
    assert torch.equal(kept[3:4], support(logits[:1], min_p=column(0.5)))


@pytest.mark.parametrize("num_inside", [510, 511, 512, 513, 514, 700])
def test_top_p_beyond_the_candidates_equals_the_full_sort(
    num_inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nucleus that ends just before, at and after the number of candidates, and a narrow row."""
    logits = torch.stack([random_logits(1, 1, 900, 0.3)[0], random_logits(2, 1, 900, 6.0)[0]])
    order = logits[0].sort(descending=True).values.double().softmax(-1).cumsum(-1)
    p = float(order[num_inside - 2] + order[num_inside - 1]) / 2  # between two sums

    kept = support(logits, top_p=column(p, p))
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", 900)
    full = support(logits, top_p=column(p, p))

    assert int(kept[0].sum()) == num_inside
    assert torch.equal(kept, full)


@given(seed=seeds, temperature=st.floats(0.05, 10))
@settings(max_examples=30)
def test_temperature_divides_before_the_filters(seed: int, temperature: float) -> None:
    """The filters see what transformers' chain of temperature and top_p shows them."""
    logits = random_logits(seed, 1, 40)
    theirs = warped(TopPLogitsWarper(0.7), warped(TemperatureLogitsWarper(temperature), logits))
    allowed = set((theirs[0] > NEVER).nonzero().squeeze(1).tolist())

    many = [params(temperature=temperature, top_p=0.7, seed=n) for n in range(40)]
    drawn = set(draw_tokens(logits.repeat(40, 1), many).tolist())

    assert drawn <= allowed


# ---------------------------------------------------------------- changes of logits


def penalised(
    logits: torch.Tensor, history: list[int], num_prompt: int, **options: Any
) -> torch.Tensor:
    """One row of logits after the penalties alone."""
    rows = RowTable(1, logits.shape[1], CPU)
    rows.set(0, params(temperature=0.0, **options), 0)
    batch = rows.batch([Draw(0, history, num_prompt)])
    scores = logits.clone()
    assert batch.penalties is not None
    sampling._penalise(scores, batch.penalties)
    return scores


tokens = st.lists(st.integers(0, 29), min_size=1, max_size=20)


@given(seed=seeds, prompt=tokens, answer=tokens, penalty=st.floats(0.1, 5))
@settings(max_examples=30)
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(
    seed: int, prompt: list[int], answer: list[int], penalty: float
) -> None:
    logits = random_logits(seed, 1, 30)
    if abs(penalty - 1) < 1e-3:
        penalty = 1.5

    found = penalised(logits, prompt + answer, len(prompt), repetition_penalty=penalty)

    processor = RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor([prompt + answer]), logits.clone())
    torch.testing.assert_close(found, theirs)


@given(
    seed=seeds,
    prompt=tokens,
    answer=st.lists(st.integers(0, 29), max_size=20),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
)
@settings(max_examples=30)
def test_presence_and_frequency_follow_the_formula_of_openai_over_the_answer(
    seed: int, prompt: list[int], answer: list[int], presence: float, frequency: float
) -> None:
    """mu[j] - count[j] * frequency - (count[j] > 0) * presence."""
    logits = random_logits(seed, 1, 30)
    options = {"presence_penalty": presence or 1.0, "frequency_penalty": frequency}

    found = penalised(logits, prompt + answer, len(prompt), **options)

    for token in range(30):
        count = answer.count(token)
        wanted = float(logits[0, token]) - count * frequency
        wanted -= (count > 0) * options["presence_penalty"]
        assert float(found[0, token]) == pytest.approx(wanted, abs=1e-4)


def test_penalties_of_some_rows_leave_the_others_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]]).repeat(3, 1)
    ways = [
        params(temperature=0.0),
        params(temperature=0.0, presence_penalty=1.5),
        params(temperature=0.0, frequency_penalty=0.9),
    ]

    chosen = draw_tokens(logits, ways, [[0, 2], [0, 2], [0, 2, 2]], num_prompt=1)

    assert chosen.tolist() == [2, 1, 1]


def test_logit_bias_is_added_before_everything_else() -> None:
    logits = random_logits(0, 3, 20)
    favoured = params(temperature=0.0, logit_bias={7: 100.0})
    forbidden = params(temperature=1.0, logit_bias={int(logits[1].argmax()): -100.0}, top_k=1)

    chosen = draw_tokens(logits, [favoured, forbidden, params(temperature=0.0)])

    assert chosen.tolist() == [7, int(logits[1].topk(2).indices[1]), int(logits[2].argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_masks_stop_ids_until_there_are_enough(temperature: float) -> None:
    logits = torch.full((1, 10), -20.0)
    logits[0, 4], logits[0, 6], logits[0, 8] = 30.0, 20.0, 5.0
    ways = [
        params(temperature=temperature, stop_token_ids=(4, 6), min_tokens=3, logit_bias={4: 50.0})
    ]

    said = [
        int(draw_tokens(logits, ways, [[0, 0, *([8] * count)]], num_prompt=2)[0])
        for count in range(5)
    ]

    assert said == [8, 8, 8, 4, 4]


# ---------------------------------------------------------------- log probabilities


@given(
    seed=seeds, num_top=st.integers(0, 25), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=30)
def test_logprobs_are_the_log_softmax_with_ranks(
    seed: int, num_top: int, dtype: torch.dtype
) -> None:
    logits = random_logits(seed, 4, 20).to(dtype)
    chosen = torch.randint(20, (4,), generator=torch.Generator().manual_seed(seed))

    found = logprobs(logits, chosen, num_top)

    wanted = logits.double().log_softmax(-1)
    assert found.top.shape == found.top_ids.shape == (4, min(num_top, 20))
    for row, token in enumerate(chosen.tolist()):
        assert float(found.chosen[row]) == pytest.approx(float(wanted[row, token]), abs=1e-5)
        assert int(found.rank[row]) == 1 + int((logits[row] > logits[row, token]).sum())
        best = wanted[row].sort(descending=True).values[:num_top]
        torch.testing.assert_close(found.top[row].double(), best, atol=1e-5, rtol=0)
        assert torch.equal(wanted[row][found.top_ids[row]], best)


# ---------------------------------------------------------------- the draw


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [9.0, 1.0, 1.0, 9.0]])

    for dtype in (torch.float32, torch.bfloat16):
        assert draw_tokens(logits.to(dtype), [params(temperature=0.0)] * 2).tolist() == [1, 0]


def test_greedy_and_drawing_rows_share_a_batch() -> None:
    logits = random_logits(0, 4, 50)
    ways = [params(temperature=t, seed=n) for n, t in enumerate([0.0, 1.0, 0.0, 2.0])]

    together = draw_tokens(logits, ways)

    assert together[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    for row in (1, 3):
        assert int(together[row]) == int(draw_tokens(logits[row : row + 1], [ways[row]])[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square over seeds and over positions; its 99.9 % point for 11 degrees is 31.3."""
    num_draws, vocab = 6000, 12
    logits = random_logits(5, 1, vocab, 1.2)
    ways = [params(**({"temperature": 1.0, "seed": n // 2} | options)) for n in range(num_draws)]
    histories = [[0] * (1 + number % 2) for number in range(num_draws)]

    counts = torch.bincount(
        draw_tokens(logits.repeat(num_draws, 1), ways, histories), minlength=vocab
    )

    scores = warped(TemperatureLogitsWarper(float(options.get("temperature", 1.0))), logits)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        scores = warped(warper(options[name]), scores) if name in options else scores
    scores = warped(MinPLogitsWarper(options["min_p"]), scores) if "min_p" in options else scores
    wanted = scores[0].softmax(-1) * num_draws
    possible = wanted > 0
    assert int(counts[~possible].sum()) == 0
    chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    assert float(chi_square) < 31.3


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_position_only() -> None:
    seed, position = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(100))
    found = uniforms(seed.ravel(), position.ravel()).squeeze(1)

    assert float(found.min()) >= 0
    assert float(found.max()) < 1
    counts = torch.histc(found, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # 99.9 % of 19 degrees
    assert len(found.unique()) > 19_900
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    again = uniforms(seed.ravel()[order.numpy()], position.ravel()[order.numpy()]).squeeze(1)
    assert torch.equal(again, found[order])


def test_seeds_of_64_bits_are_all_different() -> None:
    near = [0, 1, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 2, 2**64 - 1]
    found = uniforms(np.array(near, dtype=np.uint64), np.zeros(len(near), dtype=np.int64))

    assert len(found.unique()) == len(near)


@given(seed=seeds, data=st.data())
@settings(max_examples=30)
def test_a_row_answers_the_same_in_any_company_and_order(seed: int, data: st.DataObject) -> None:
    logits = random_logits(seed, 6, 700, 1.0)
    ways = [
        data.draw(
            st.builds(
                params,
                temperature=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
                top_k=st.sampled_from([0, 3, 100, 650]),
                top_p=st.sampled_from([1.0, 0.5, 0.9, 0.999]),
                min_p=st.sampled_from([0.0, 0.01, 0.3]),
                presence_penalty=st.sampled_from([0.0, 1.0]),
                frequency_penalty=st.sampled_from([0.0, -1.0]),
                repetition_penalty=st.sampled_from([1.0, 1.3]),
                logit_bias=st.sampled_from([{}, {3: 4.0, 600: -2.0}]),
                seed=st.integers(0, 2**64 - 1),
                logprobs=st.sampled_from([None, 2]),
            )
        )
        for _ in range(6)
    ]
    histories = [data.draw(st.lists(st.integers(0, 699), min_size=2, max_size=9)) for _ in ways]
    order = data.draw(st.permutations(range(6)))[: data.draw(st.integers(1, 6))]

    together = draw_tokens(
        logits[order], [ways[n] for n in order], [histories[n] for n in order], num_prompt=2
    )

    for place, number in enumerate(order):
        alone = draw_tokens(
            logits[number : number + 1], [ways[number]], [histories[number]], num_prompt=2
        )
        assert int(together[place]) == int(alone[0])


# ---------------------------------------------------------------- rows beyond reason


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [NEVER, float("nan"), float("inf")], ids=str)
def test_a_row_without_a_distribution_yields_an_id_and_harms_no_neighbour(
    value: float, temperature: float, options: dict[str, Any]
) -> None:
    logits = random_logits(0, 3, 40)
    wanted = draw_tokens(logits, [params(temperature=temperature, seed=9, **options)] * 3)
    logits[1] = value

    chosen = draw_tokens(logits, [params(temperature=temperature, seed=9, **options)] * 3)

    assert 0 <= int(chosen[1]) < 40
    assert chosen[[0, 2]].tolist() == wanted[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-45])
def test_the_least_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(0, 8, 100)
    ways = [params(temperature=temperature, seed=n) for n in range(8)]

    assert draw_tokens(logits, ways).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{"top_p": 1e-30}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_filter_is_greedy(options: dict[str, Any]) -> None:
    logits = random_logits(0, 8, 600)
    ways = [params(temperature=5.0, seed=n, **options) for n in range(8)]

    assert draw_tokens(logits, ways).tolist() == logits.argmax(-1).tolist()


def test_the_largest_uniform_number_takes_the_last_token_with_any_mass() -> None:
    scores = torch.tensor([[0.0, 0.0, NEVER, NEVER], [NEVER, 0.0, NEVER, 0.0]])
    almost_one = torch.full((2, 1), math.nextafter(1.0, 0.0))

    assert sampling._draw(scores, almost_one).tolist() == [1, 3]
    assert sampling._draw(scores, torch.zeros(2, 1)).tolist() == [0, 1]
