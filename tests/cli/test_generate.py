"""`naiad generate`: sampling flags from the contract's own struct, answers on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from naiad.backends.scripted import ScriptedLanguageModel
from naiad.cli import generate, main
from naiad.core.errors import InvalidSettings
from naiad.core.generation import ChatPrompt, GenerateRequest, SamplingParams, TextPrompt

NONE: dict[str, Any] = {setting.name: None for setting in generate.SAMPLING}


def test_sampling_flags_become_sampling_params() -> None:
    flags = {"n": "2", "temperature": "0", "stop": ("a", "b"), "logit_bias": '{"7": -1.5}'}
    assert generate.read_sampling(NONE | flags | {"ignore_eos": True}) == SamplingParams(
        n=2, temperature=0.0, stop=("a", "b"), logit_bias={7: -1.5}, ignore_eos=True
    )
    assert generate.read_sampling(NONE) == SamplingParams()


def test_a_sampling_flag_out_of_range_is_named() -> None:
    with pytest.raises(InvalidSettings, match=r"--top-p: expected `float` <= 1.0, got '2'"):
        generate.read_sampling(NONE | {"top_p": "2"})


def test_a_prompt_may_be_a_chat_message() -> None:
    assert generate.read_prompt("hi", chat=False) == TextPrompt("hi")
    assert generate.read_prompt("hi", chat=True) == ChatPrompt(({"role": "user", "content": "hi"},))


@pytest.mark.parametrize(
    ("n", "printed"),
    [(1, "one two\n"), (2, "--- 1 of 2\none two\n--- 2 of 2\none two\n")],
)
async def test_answers_go_to_stdout(
    n: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = GenerateRequest(id="r", prompt=TextPrompt("count"), sampling=SamplingParams(n=n))
    await generate.write_answers(ScriptedLanguageModel(["one", " two"]), request)
    assert capsys.readouterr() == (printed, "")


def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["generate", str(tmp_path), "hi"])
    assert caught.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"naiad: {tmp_path} has no ")
