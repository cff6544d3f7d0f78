"""The model that comes with Naiad is found by its name, and is the one transformers reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from naiad.backends.llm.builtin import FOLDER, path_of
from naiad.backends.llm.offline import LLM
from naiad.core.generation import FinishReason, SamplingParams, TokensPrompt

PROMPTS = (
    'def read(path):\n    """Return the contents of a file."""',
    "import os\n\ndef exists(path):",
    "class Queue:\n    def __init__(self, maxsize=0):",
    "if __name__ ==",
    "for key, value in",
)
NUM_TOKENS = 48


def test_the_name_means_the_model_and_everything_else_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "builtin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert path_of("builtin") == FOLDER
    assert path_of("./builtin") == Path("builtin")
    assert path_of(Path("builtin")) == Path("builtin")
    assert path_of("elsewhere/builtin") == Path("elsewhere/builtin")


def test_it_is_small_enough_to_ship_and_has_its_card() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 14_000_000
    assert "PSF" in (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    pytest.importorskip("torch")
    with LLM("builtin", dtype="float32", max_num_seqs=8, max_model_len=256) as made:
        yield made


@pytest.mark.timeout(240)  # transformers' generate, in fp32, beside other tests
def test_greedy_tokens_are_those_of_transformers(llm: LLM) -> None:
    from tests.engine.golden import reference_tokens

    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for result in llm.generate(PROMPTS, greedy, use_tqdm=False):
        prompt = tuple(result.prompt_token_ids)
        assert result.outputs[0].token_ids == reference_tokens(FOLDER, prompt, NUM_TOKENS)


def test_text_and_conversations_become_the_tokens_of_transformers(llm: LLM) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    one = SamplingParams(max_tokens=1)
    (text,) = llm.generate(PROMPTS[0], one, use_tqdm=False)
    (chat,) = llm.chat(messages, one, use_tqdm=False)
    assert text.prompt_token_ids == theirs(PROMPTS[0]).input_ids
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.prompt_token_ids == theirs(rendered, add_special_tokens=False).input_ids


def test_it_answers_and_ends_its_turn(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=80, temperature=0.0)
    (result,) = llm.chat(
        [{"role": "user", "content": "What does str.upper do?"}], greedy, use_tqdm=False
    )
    answer = result.outputs[0]
    assert "Return a copy of the string converted to uppercase." in answer.text
    assert answer.finish_reason is FinishReason.STOP


def test_its_defaults_make_samples_less_wild(llm: LLM) -> None:
    prompt = TokensPrompt(tuple(llm.generate("def", use_tqdm=False)[0].prompt_token_ids))
    seeded = SamplingParams(max_tokens=8, seed=1)
    spelled = SamplingParams(max_tokens=8, seed=1, temperature=0.4, top_p=0.9)
    (by_default,) = llm.generate(prompt, seeded, use_tqdm=False)
    (as_asked,) = llm.generate(prompt, spelled, use_tqdm=False)
    assert by_default.outputs[0].token_ids == as_asked.outputs[0].token_ids
