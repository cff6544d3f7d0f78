"""Generation defaults of a checkpoint that may be wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from naiad.backends.llm.defaults import ModelDefaults
from naiad.backends.llm.tokenizer import Tokenizer
from naiad.core.errors import InvalidModel
from tests.backends.llm.conftest import EOS, byte_level_tokenizer

TOKENIZER = Tokenizer(byte_level_tokenizer(), {"eos_token": EOS})


def read(folder: Path, generation: dict[str, Any], **config: Any) -> ModelDefaults:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config))
    return ModelDefaults.from_folder(folder, TOKENIZER)


@pytest.mark.parametrize("ids", [512, [1, 999], -1])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_an_end_outside_the_vocabulary_is_refused_by_file_and_value(
    tmp_path: Path, ids: Any, place: str
) -> None:
    generation = {"eos_token_id": ids} if place.startswith("generation") else {}
    config = {} if generation else {"eos_token_id": ids}

    with pytest.raises(InvalidModel) as caught:
        read(tmp_path, generation, vocab_size=512, **config)

    assert str(tmp_path / place) in str(caught.value)
    assert f"{ids[-1] if isinstance(ids, list) else ids} is outside the vocabulary of 512" in str(
        caught.value
    )


def test_without_a_vocabulary_size_the_tokenizers_counts(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=f"vocabulary of {TOKENIZER.vocab_size}"):
        read(tmp_path, {"eos_token_id": TOKENIZER.vocab_size})
    assert read(tmp_path, {"eos_token_id": 400}, text_config={"vocab_size": 401})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 7),
        ("temperature", -1),
        ("repetition_penalty", 0),
        ("top_k", -5),
        ("min_p", 2.0),
        ("temperature", float("nan")),
    ],
)
def test_a_sampling_value_out_of_range_is_ignored_with_a_warning(
    tmp_path: Path, name: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, {"eos_token_id": [1], name: value})

    assert found == ModelDefaults(eos_token_ids=(1,))
    assert f"generation_config.json: {name} {value} is ignored" in caplog.text


def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"generation_config\.json: .*top_p"):
        read(tmp_path, {"top_p": "high"})
