"""`LLM`: the same checkpoint and code without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from naiad.backends.llm.offline import LLM, AnyPrompt
from naiad.core.errors import InvalidModel, InvalidRequest, InvalidSettings, QueueFull, WireError
from naiad.core.generation import FinishReason, SamplingParams, TokensPrompt
from naiad.engine.messages import EngineRequest, Rejected, StepOutputs
from tests.backends.llm.fake_engine import FakeEngine

FEW = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, make_engine=FakeEngine, max_queued_requests=4, max_num_seqs=2) as made:
        yield made


def engine_of(llm: LLM) -> FakeEngine:
    assert isinstance(llm._engine, FakeEngine)
    return llm._engine


def test_one_text_one_list_of_ids_and_lists_of_both(llm: LLM) -> None:
    (one,) = llm.generate("the cat", FEW, use_tqdm=False)
    (ids,) = llm.generate([5, 6], FEW, use_tqdm=False)
    prompts: list[AnyPrompt] = ["the cat", [5, 6], TokensPrompt((7,))]
    several = llm.generate(prompts, FEW, use_tqdm=False)

    assert one.prompt == "the cat"
    assert one.prompt_token_ids[0] == 0
    assert one.num_cached_tokens == 1
    assert ids.prompt is None
    assert ids.outputs[0].token_ids == [5, 6, 5, 6]
    assert ids.outputs[0].finish_reason is FinishReason.LENGTH
    assert [result.prompt_token_ids for result in several[1:]] == [[5, 6], [7]]


def test_more_prompts_than_the_queue_takes_are_fed_bit_by_bit_in_order(llm: LLM) -> None:
    prompts = [[number] for number in range(3, 103)]
    results = llm.generate(prompts, FEW, use_tqdm=False)
    assert [result.outputs[0].token_ids for result in results] == [[n] * 4 for n in range(3, 103)]


def test_prompts_are_fed_by_their_tokens_too_and_a_long_one_alone(folder: Path) -> None:
    sent: list[list[int]] = []

    class Counting(FakeEngine):
        def submit(self, request: EngineRequest) -> None:
            super().submit(request)
            sequences = [*self.running, *self.waiting]
            sent.append([len(s.request.prompt_token_ids) for s in sequences])

    prompts = [[3] * 4] * 5 + [[3] * 30] + [[3] * 4] * 5
    with LLM(folder, make_engine=Counting, max_queued_tokens=10, max_num_seqs=2) as llm:
        results = llm.generate(prompts, FEW, use_tqdm=False)

    assert [len(result.prompt_token_ids) for result in results] == [4] * 5 + [30] + [4] * 5
    assert max(map(len, sent)) == 2
    assert all(sum(lengths) <= 10 or lengths == [30] for lengths in sent)


def test_parameters_may_differ_by_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, n=n) for n in (1, 2)]
    results = llm.generate([[5], [6]], params, use_tqdm=False)
    assert [[len(out.token_ids) for out in result.outputs] for result in results] == [[1], [2, 2]]
    assert [out.index for out in results[1].outputs] == [0, 1]

    with pytest.raises(InvalidRequest, match="2 prompts, but 1 sampling parameters"):
        llm.generate([[5], [6]], params[:1], use_tqdm=False)


def test_a_stop_string_ends_an_answer_and_frees_the_engine(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4000, stop=("sat",))
    (result,) = llm.generate("the cat sat", params, use_tqdm=False)
    assert result.outputs[0].text == "the cat "
    assert result.outputs[0].stop_reason == "sat"
    assert not engine_of(llm).has_work()


def test_log_probabilities_and_their_sum(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=0)
    (result,) = llm.generate([5, 6], params, use_tqdm=False)
    assert result.outputs[0].logprobs is not None
    assert len(result.outputs[0].logprobs) == 4
    assert result.outputs[0].cumulative_logprob == -2.0
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 2


def test_one_conversation_or_several(llm: LLM) -> None:
    talk = [{"role": "user", "content": "the cat"}]
    (one,) = llm.chat(talk, FEW, use_tqdm=False)
    two = llm.chat([talk, talk], FEW, use_tqdm=False)
    assert one.prompt == "<s><|user|>the cat<|end|><|assistant|>"
    assert [result.prompt for result in two] == [one.prompt] * 2


def test_nothing_runs_if_one_prompt_is_invalid(llm: LLM) -> None:
    prompts: list[AnyPrompt] = ["the cat", TokensPrompt(())]
    with pytest.raises(InvalidRequest, match="prompt 1: the prompt is empty"):
        llm.generate(prompts, FEW, use_tqdm=False)
    assert engine_of(llm).stats.num_steps == 0


def test_no_prompts_are_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_a_failure_leaves_the_engine_without_work(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(llm)
    step = engine.step

    def refuse() -> StepOutputs:
        outputs = step()
        error = WireError.of(QueueFull("no room"))
        return StepOutputs(rejected=[Rejected(2, error)], stats=outputs.stats)

    monkeypatch.setattr(engine, "step", refuse)
    with pytest.raises(QueueFull, match="no room"):
        llm.generate([[5], [6]], SamplingParams(), use_tqdm=False)
    assert not engine.has_work()


def test_a_progress_bar_shows_prompts_and_speed(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate([[5], [6]], FEW)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    assert "out " in shown.err
    assert "tok/s" in shown.err


def test_unknown_settings_are_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="gpu_memory"):
        LLM(tmp_path, gpu_memory=1)
    with pytest.raises(InvalidModel, match=r"config\.json"):
        LLM(tmp_path)


def test_the_context_manager_closes_the_engine(folder: Path) -> None:
    with LLM(folder, make_engine=FakeEngine) as llm:
        engine = engine_of(llm)
    assert engine.closed
