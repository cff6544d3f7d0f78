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


@pytest.mark.parametrize("command", [["generate", "PATH", "hi"], ["serve", "PATH"]])
@pytest.mark.parametrize(
    ("name", "complaint"), [("", " has no config.json"), ("nowhere", " is not a folder")]
)
def test_a_path_that_is_no_checkpoint_is_refused_for_what_it_lacks_first(
    command: list[str],
    name: str,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("naiad.cli.serve.configure_logs", lambda _settings: None)
    path = tmp_path / name
    with pytest.raises(SystemExit) as caught:
        main.main([str(path) if word == "PATH" else word for word in command])
    assert caught.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"naiad: {path}{complaint}")
