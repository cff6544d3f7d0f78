"""Settings come from structs; a wrong one is refused by the name that the operator wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from naiad.core.errors import InvalidSettings
from naiad.core.settings import describe, field_docs, load, settings_reference


class Engine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the engine runs."""

    device: Literal["auto", "cpu"] = "auto"
    """Where it
    runs."""
    max_num_seqs: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Most sequences in one step."""
    min_num_seqs: int = 0
    fraction: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.min_num_seqs > self.max_num_seqs:
            raise ValueError("min_num_seqs exceeds max_num_seqs")


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server listens."""

    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    timeout_s: Annotated[float, Meta(gt=0)] | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    server: Server = Server()
    engine: Engine = Engine()


def toml(folder: Path, text: str) -> Path:
    path = folder / "naiad.toml"
    path.write_text(text)
    return path


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    settings = load(
        Settings,
        file=toml(tmp_path, "[engine]\nmax_num_seqs = 1\nfraction = 0.1\nprefix_cache = false"),
        environ={"NAIAD_ENGINE__MAX_NUM_SEQS": "2", "NAIAD_ENGINE__FRACTION": "0.2", "HOME": "/"},
        flags={"max_num_seqs": "3", "host": None},
    )
    assert settings.engine == Engine(max_num_seqs=3, fraction=0.2, prefix_cache=False)
    assert settings.server == Server()


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("NAIAD_ENGINE__PREFIX_CACHE", "false", Engine(prefix_cache=False)),
        ("NAIAD_ENGINE__DEVICE", "cpu", Engine(device="cpu")),
        ("NAIAD_SERVER__NAMES", "a,b", Server(names=("a", "b"))),
        ("NAIAD_SERVER__NAMES", '["a,b"]', Server(names=("a,b",))),
        ("NAIAD_SERVER__TIMEOUT_S", "1.5", Server(timeout_s=1.5)),
        ("NAIAD_SERVER__HOST", "[::1]", Server(host="[::1]")),
    ],
)
def test_the_environment_is_text(variable: str, text: str, expected: msgspec.Struct) -> None:
    assert expected in msgspec.structs.astuple(load(Settings, environ={variable: text}))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[engin]", "[engin]: no such section", "did you mean engine?"),
        ("[engine]\nmax_num_seq = 1", "[engine] max_num_seq: no such setting", "max_num_seqs?"),
        (
            "[engine]\nmax_num_seqs = 5000",
            "[engine] max_num_seqs: expected `int` <= 4096, got 5000",
            "Most sequences in one step.",
        ),
        ("[engine]\nmax_num_seqs = '1'", "max_num_seqs: expected `int`, got '1'", ""),
        (
            "[engine]\ndevice = 'tpu'",
            "device: expected one of auto, cpu, got 'tpu'",
            "Where it runs",
        ),
        ("engine = 1", "engine is a section", ""),
        ("[engine", "not TOML", ""),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(Settings, file=toml(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "naiad.toml"))
    assert message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("environ", "message", "hint"),
    [
        (
            {"NAIAD_ENGINE__MAX_NUM_SEQUENCES": "1"},
            "NAIAD_ENGINE__MAX_NUM_SEQUENCES: no such environment variable",
            "did you mean NAIAD_ENGINE__MAX_NUM_SEQS?",
        ),
        ({"NAIAD_ENGINE__FRACTION": "1"}, "NAIAD_ENGINE__FRACTION: expected `float` < 1.0", ""),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(
    environ: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(Settings, environ=environ)
    assert message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_num_seqs": "many"}, "--max-num-seqs: expected `int`, got 'many'"),
        ({"min_num_seqs": "2"}, "min_num_seqs exceeds max_num_seqs - at `$.engine`"),
    ],
)
def test_a_wrong_flag_is_refused_by_its_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(Settings, flags=flags)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="No such file"):
        load(Settings, file=tmp_path / "absent.toml")


def test_help_is_the_docstring_below_the_field() -> None:
    assert field_docs(Engine) == {
        "device": "Where it runs.",
        "max_num_seqs": "Most sequences in one step.",
    }
    settings = {setting.name: setting for setting in describe("engine", Engine)}
    assert settings["max_num_seqs"].variable == "NAIAD_ENGINE__MAX_NUM_SEQS"
    assert settings["max_num_seqs"].flag == "--max-num-seqs"
    assert settings["device"].choices == ("auto", "cpu")


def test_the_reference_states_type_range_default_and_meaning() -> None:
    text = settings_reference(Settings)
    assert "## [engine]\n\nHow the engine runs.\n" in text
    assert "| `max_num_seqs` | integer, ≥ 0, ≤ 4096 | `0` | Most sequences in one step. |" in text
    assert '| `device` | `auto` or `cpu` | `"auto"` | Where it runs. |' in text
    assert "| `names` | list of text | `[]` | |" in text
    assert "| `timeout_s` | number, > 0 or nothing | `null` | |" in text
