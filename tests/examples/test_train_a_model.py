"""The script that made the built-in model runs from nothing to a folder that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train-a-model"
TINY = (
    "--max-files 60 --no-tests --vocab-size 512 --hidden-size 32 --intermediate-size 64"
    " --num-layers 1 --num-heads 4 --num-kv-heads 2 --context-tokens 64 --batch-rows 4"
    " --num-steps 30 --eval-every 10 --warmup-steps 5 --num-functions 2 --device cpu --no-compile"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    command = [sys.executable, str(EXAMPLE / "train.py"), str(folder), *TINY]
    one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    environment = {**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_the_loss_falls(trained: Path) -> None:
    measured = json.loads((trained / "measured.json").read_text(encoding="utf-8"))
    losses = [entry["held_out_loss"] for entry in measured["history"]]
    assert losses == sorted(losses, reverse=True)
    assert measured["held_out_loss"] == pytest.approx(losses[-1], abs=0.01)
    assert measured["best_step"] == 30


def test_functions_are_completed_by_the_decoder_and_by_n_grams(trained: Path) -> None:
    measured = json.loads((trained / "measured.json").read_text(encoding="utf-8"))
    assert len(measured["functions"]) == 2
    for name in ("decoder", "4-gram"):
        assert 0 <= measured[name]["good_and_ended"] <= measured[name]["good"] <= 1
        for own, text in zip(measured["functions"], measured[name]["texts"], strict=True):
            assert text.splitlines()[0] == own.splitlines()[0]


def test_the_folder_loads_and_generates(trained: Path) -> None:
    from naiad import LLM, SamplingParams

    few = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(trained) as llm:
        (completed,) = llm.generate("def main():", few, use_tqdm=False)
        (answered,) = llm.chat([{"role": "user", "content": "Hello"}], few, use_tqdm=False)
    assert [len(r.outputs[0].token_ids) for r in (completed, answered)] == [8, 8]


def test_the_chat_template_renders_what_was_trained_on(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from naiad.backends.llm.template import ChatTemplate

    monkeypatch.syspath_prepend(str(EXAMPLE))
    from corpus import BOS, chat_text  # type: ignore[import-not-found]

    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    template = ChatTemplate.from_folder(trained, {"bos_token": BOS})
    rendered = template.render(messages, add_generation_prompt=False)
    assert rendered == BOS + chat_text([("a", "b"), ("c", "d")])
