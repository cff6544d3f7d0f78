"""From the contract to the engine's messages and back, without an engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from naiad.backends.llm.defaults import ModelDefaults
from naiad.backends.llm.requests import (
    Answer,
    CheckpointText,
    Limits,
    Prompt,
    coalesce,
    is_long,
)
from naiad.backends.llm.requests import engine_request as to_engine
from naiad.backends.llm.template import ChatTemplate
from naiad.backends.llm.tokenizer import Tokenizer
from naiad.core.errors import InvalidModel, InvalidRequest
from naiad.core.generation import (
    ChatPrompt,
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from naiad.engine.messages import EngineSampling, SequenceOutput, TokenLogprobs
from tests.backends.llm.conftest import BOS, EOS, TEMPLATE, byte_level_tokenizer

TOKENIZER = Tokenizer(byte_level_tokenizer(), {"bos_token": BOS, "eos_token": EOS})
DEFAULTS = ModelDefaults(eos_token_ids=(1, 2))
TEXT = CheckpointText(TOKENIZER, ChatTemplate(TEMPLATE, TOKENIZER.special_tokens), DEFAULTS)
LIMITS = Limits(vocab_size=512, max_model_len=64)
EOS_ID = 1


def resolve(
    defaults: ModelDefaults = DEFAULTS, num_prompt: int = 4, **sampling: Any
) -> EngineSampling:
    request = GenerateRequest(id="r", prompt=TextPrompt(""), sampling=SamplingParams(**sampling))
    prompt = Prompt([5] * num_prompt)
    return to_engine(request, prompt, defaults, LIMITS, number=1, arrival_ns=0).sampling


def test_what_the_request_leaves_open_is_the_checkpoints_then_neutral() -> None:
    checkpoint = ModelDefaults(temperature=0.6, top_p=0.9)

    resolved = resolve(checkpoint, top_p=0.5)

    assert (resolved.temperature, resolved.top_p) == (0.6, 0.5)
    assert (resolved.top_k, resolved.min_p, resolved.repetition_penalty) == (0, 0.0, 1.0)


def test_max_tokens_is_clipped_to_the_context_and_open_means_all_of_it() -> None:
    assert resolve(num_prompt=60).max_tokens == 4
    assert resolve(num_prompt=60, max_tokens=100, min_tokens=50).max_tokens == 4
    assert resolve(num_prompt=60, max_tokens=100, min_tokens=50).min_tokens == 4
    assert resolve(num_prompt=60, max_tokens=3).max_tokens == 3


def test_a_seed_is_always_set_and_unsigned() -> None:
    assert resolve(seed=-1).seed == 2**64 - 1
    assert resolve(seed=7).seed == 7
    assert resolve().seed != resolve().seed


def test_end_of_sequence_stops_unless_ignored() -> None:
    assert resolve(stop_token_ids=(9, 1)).stop_token_ids == (9, 1, 2)
    assert resolve(stop_token_ids=(9,), ignore_eos=True).stop_token_ids == (9,)


def test_top_k_of_minus_one_means_all() -> None:
    assert resolve(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("sampling", "complaint"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"n": 0}, r"\$\.n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {512: 1.0}}, "logit_bias: token id 512 is outside the vocabulary of 512"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"stop_token_ids": (600,)}, "stop_token_ids: token id 600"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, max_tokens only 4"),
    ],
)
def test_parameters_out_of_range_are_refused_with_the_numbers(
    sampling: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        resolve(**sampling)


def test_text_is_encoded_with_special_tokens_and_a_rendered_chat_without() -> None:
    text = TEXT.read_prompt(TextPrompt("the cat"), LIMITS)
    chat = TEXT.read_prompt(ChatPrompt(({"role": "user", "content": "the cat"},)), LIMITS)

    assert text.token_ids[0] == 0
    assert text.text == "the cat"
    assert chat.text == "<s><|user|>the cat<|end|><|assistant|>"
    assert chat.token_ids.count(0) == 1  # the template's own, not a second one


def test_a_plain_template_leaves_special_tokens_to_the_tokenizer() -> None:
    text = CheckpointText(TOKENIZER, ChatTemplate(None, {}), DEFAULTS)
    chat = text.read_prompt(ChatPrompt(({"role": "user", "content": "the cat"},)), LIMITS)
    assert chat.token_ids[0] == 0


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (TokensPrompt(()), "prompt is empty"),
        (TokensPrompt((5,) * 64), "has 64 tokens, the model takes at most 64 of prompt and answer"),
        (TokensPrompt((5, 512)), "prompt: token id 512 is outside the vocabulary of 512"),
        (TokensPrompt((-1,)), "prompt: token id -1"),
        (TextPrompt("x y " * 40), "the model takes at most 64"),
        (TextPrompt("x" * 100_000), "has at least 1"),
    ],
)
def test_prompts_that_cannot_run_are_refused_with_the_numbers(
    prompt: TokensPrompt | TextPrompt, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        TEXT.read_prompt(prompt, LIMITS)


def test_a_prompt_that_leaves_room_for_one_token_is_taken() -> None:
    assert len(TEXT.read_prompt(TokensPrompt((5,) * 63), LIMITS).token_ids) == 63


# ---- answers


def answer(**sampling: Any) -> Answer:
    request = GenerateRequest(id="r", prompt=TextPrompt("the"), sampling=SamplingParams(**sampling))
    return Answer(0, request, Prompt([0, 5, 6], "the"), TOKENIZER, arrival_ns=10)


def out(*token_ids: int, finish: str | None = None, **fields: Any) -> SequenceOutput:
    if finish == "stop":
        fields.setdefault("stop_token_id", token_ids[-1])
    return SequenceOutput(id=1, index=0, token_ids=list(token_ids), finish_reason=finish, **fields)


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def feed(state: Answer, *outputs: SequenceOutput) -> list[GenerateDelta]:
    deltas = [state.feed(output, now_ns=100 + number) for number, output in enumerate(outputs)]
    return [delta for delta in deltas if delta is not None]


def text_of(deltas: list[GenerateDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_the_first_delta_tells_of_the_prompt_and_the_last_of_the_time() -> None:
    first, last = feed(
        answer(),
        out(5, prompt_cached_tokens=2, first_scheduled_ns=20, first_token_ns=30),
        out(6, finish="length"),
    )

    assert first.prompt is not None
    assert (first.prompt.num_tokens, first.prompt.num_cached_tokens) == (3, 2)
    assert first.prompt.text == "the"
    assert first.timing is None
    assert last.prompt is None
    assert last.timing is not None
    assert last.timing.arrival_ns == 10
    assert (last.timing.first_scheduled_ns, last.timing.first_token_ns) == (20, 30)
    assert last.timing.last_token_ns == 101


def test_a_step_without_tokens_makes_no_delta() -> None:
    assert answer().feed(out(), now_ns=0) is None


def test_end_of_sequence_has_no_text_and_no_stop_reason() -> None:
    ids = tokens("the cat")
    deltas = feed(answer(), *map(out, ids), out(EOS_ID, finish="stop"))
    assert text_of(deltas) == "the cat"
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason is None
    assert deltas[-1].token_ids == (EOS_ID,)


def test_a_stop_token_of_the_request_is_its_reason_and_has_no_text() -> None:
    (cat,) = tokens(" cat")
    deltas = feed(answer(stop_token_ids=(cat,)), *map(out, tokens("the")), out(cat, finish="stop"))
    assert text_of(deltas) == "the"
    assert deltas[-1].stop_reason == cat


def test_a_stop_string_ends_the_answer_before_the_engine_does() -> None:
    state = answer(stop=("cat",))
    deltas = feed(state, out(*tokens("the")), out(*tokens(" cat sat")))
    assert text_of(deltas) == "the "
    assert deltas[-1].finish_reason is state.finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == "cat"
    assert deltas[-1].timing is not None
    assert len(deltas[-1].token_ids) == len(tokens(" cat sat"))


def test_a_stop_string_in_the_last_tokens_wins_over_their_own_reason() -> None:
    deltas = feed(answer(stop=("cat",)), out(*tokens("the cat"), finish="length"))
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == "cat"


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    deltas = feed(answer(stop=("catalogue",)), out(*tokens("the cat")), out(EOS_ID, finish="stop"))
    assert [delta.text for delta in deltas] == ["the ", "cat"]


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    (the,) = tokens("the")
    deltas = feed(answer(stop=("the",), min_tokens=2), out(the), out(the), out(the))
    assert text_of(deltas) == "thethe"
    assert deltas[-1].stop_reason == "the"


def test_an_incomplete_character_waits_and_shows_at_the_end() -> None:
    first, second = tokens("é")
    state = answer()
    deltas = feed(state, out(first), out(second), out(first, finish="length"))
    assert [delta.text for delta in deltas] == ["", "é", "\ufffd"]


def test_log_probabilities_come_with_the_tokens_texts_and_ranks() -> None:
    (cat,), (dog,) = tokens(" cat"), tokens(" dog")
    line = TokenLogprobs(cat, -1.5, 2, [dog, cat, 0], [-0.5, -1.5, -9.0])
    delta = feed(answer(logprobs=2), out(cat, logprobs=[line]))[0]
    (position,) = delta.logprobs
    assert (position.chosen.token, position.chosen.logprob, position.chosen.rank) == (
        " cat",
        -1.5,
        2,
    )
    assert [(top.token, top.rank) for top in position.top] == [(" dog", 1), (" cat", 2)]


def test_prompt_log_probabilities_come_with_the_first_delta() -> None:
    line = TokenLogprobs(5, -1.0, 1, [], [])
    delta = feed(answer(prompt_logprobs=0), out(5, prompt_logprobs=[None, line, line]))[0]
    assert delta.prompt is not None
    assert delta.prompt.logprobs is not None
    assert [at is None for at in delta.prompt.logprobs] == [True, False, False]


@given(
    text=st.text("the cast", max_size=30),
    stops=st.lists(st.text("ths ", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=30),
)
def test_however_many_tokens_a_step_brings_the_answer_is_the_same(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ids = [*tokens(text), EOS_ID]

    def run(sizes: list[int]) -> tuple[str, object]:
        state, left, deltas, number = answer(stop=tuple(stops)), ids, [], 0
        while left and state.finish_reason is None:
            size = sizes[number % len(sizes)]
            piece, left, number = left[:size], left[size:], number + 1
            deltas += feed(state, out(*piece, finish=None if left else "stop"))
        return text_of(deltas), deltas[-1].stop_reason

    assert run(cuts) == run([len(ids)]) == run([1])


def test_what_waited_is_joined_per_answer() -> None:
    deltas = [
        GenerateDelta(index=0, text="a", token_ids=(1,)),
        GenerateDelta(index=1, text="x", token_ids=(9,)),
        GenerateDelta(index=0, text="b", token_ids=(2, 3), finish_reason=FinishReason.LENGTH),
    ]
    joined = coalesce(deltas)
    assert [(d.index, d.text, d.token_ids) for d in joined] == [
        (0, "ab", (1, 2, 3)),
        (1, "x", (9,)),
    ]
    assert joined[0].finish_reason is FinishReason.LENGTH
    assert joined[1] is deltas[1]


# ---- what the checkpoint says


def defaults_of(folder: Path, **files: object) -> ModelDefaults:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return ModelDefaults.from_folder(folder, TOKENIZER)


def test_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    found = defaults_of(
        tmp_path,
        generation_config={"temperature": 0.7, "top_k": 20, "max_length": 9, "eos_token_id": [2]},
    )
    assert (found.temperature, found.top_k, found.top_p) == (0.7, 20, 1.0)
    assert found.eos_token_ids == (2, 1)  # and the tokenizer's own


def test_end_of_sequence_falls_back_to_the_models_config(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, config={"eos_token_id": 7}).eos_token_ids == (7, 1)


def test_a_default_of_the_wrong_type_names_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"generation_config\.json.*temperature"):
        defaults_of(tmp_path, generation_config={"temperature": "hot"})


@pytest.mark.parametrize(
    ("stop", "complaint"),
    [
        (("x",) * 65, "length <= 64"),
        (("x" * 8193, "y" * 8193), "16386 bytes together, at most 16384"),
    ],
)
def test_stop_strings_are_bounded_in_number_and_size(stop: tuple[str, ...], complaint: str) -> None:
    for text_of_stop in (stop, list(stop)):
        with pytest.raises(msgspec.ValidationError, match=complaint):
            msgspec.convert({"stop": text_of_stop}, SamplingParams)
    assert len(SamplingParams(stop=("x",) * 64).stop) == 64


@pytest.mark.parametrize(
    "messages",
    [
        ({"role": "r" * 520_000, "content": "a"},),
        ({"role": "user", "content": "a", "x" * 5000: 1},),
        ({"role": "user", "content": "a", "tool_calls": [{"a": ["b" * 5000]}]},),
        ({"role": "user", "content": "a"},) * 500_000,
        ({"role": "user", "content": "a", "extra": [0] * 100_000},),
    ],
)
def test_all_of_a_chat_decides_whether_it_is_long(messages: tuple[dict[str, Any], ...]) -> None:
    begun_s = time.process_time()
    assert is_long(ChatPrompt(messages), 4096)
    assert time.process_time() - begun_s < 0.1


def test_short_prompts_are_not_long() -> None:
    talk = ({"role": "user", "content": "a" * 50},) * 20
    for prompt in (TextPrompt("a" * 4096), TokensPrompt((1,) * 4096), ChatPrompt(talk)):
        assert not is_long(prompt, 4096)
    assert is_long(TextPrompt("a" * 4097), 4096)
    assert is_long(TokensPrompt((1,) * 4097), 4096)


@pytest.mark.parametrize(("include", "text"), [(False, "the"), (True, "the cat")])
def test_a_stop_token_has_text_only_if_asked_for(include: bool, text: str) -> None:
    the, cat = TOKENIZER.encode("the cat", add_special_tokens=False)
    sampling = SamplingParams(stop_token_ids=(cat,), include_stop_str_in_output=include)
    request = GenerateRequest(id="r", prompt=TextPrompt("x"), sampling=sampling)
    answer = Answer(0, request, Prompt([5]), TOKENIZER, 0)

    output = SequenceOutput(
        id=1, index=0, token_ids=[the, cat], finish_reason="stop", stop_token_id=cat
    )
    delta = answer.feed(output, 1)

    assert delta is not None
    assert (delta.text, delta.stop_reason, delta.token_ids) == (text, cat, (the, cat))


def test_a_path_that_is_no_checkpoint_says_what_is_missing_first(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="nowhere is not a folder"):
        CheckpointText.from_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidModel, match=r"has no config\.json"):
        CheckpointText.from_folder(tmp_path)
