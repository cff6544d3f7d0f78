"""The command line: errors that say what to do, and options made from the settings' structs."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Literal

import click
import msgspec
import pytest
from click.testing import CliRunner
from msgspec import Meta

import naiad
from naiad.cli import main as cli
from naiad.cli.options import load_settings, settings_options
from naiad.core.errors import InvalidModel


class Engine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine."""

    device: Literal["auto", "cpu"] = "auto"
    """Where it runs."""
    max_num_seqs: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Most sequences in one step."""
    prefix_cache: bool = True
    names: tuple[str, ...] = ()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    engine: Engine = Engine()


def run(*args: str) -> tuple[int, Engine | None, str]:
    """Exit code, the settings that the command saw, and everything printed."""
    seen: list[Engine] = []

    @click.command()
    @settings_options(Settings)
    def command(config: str | None, **flags: object) -> None:
        seen.append(load_settings(Settings, config, flags).engine)

    result = CliRunner().invoke(command, args)
    return result.exit_code, seen[0] if seen else None, result.output or str(result.exception)


def exit_of(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the real command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    printed = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, printed.out, printed.err


def test_options_become_settings() -> None:
    args = ["--device", "cpu", "--max-num-seqs", "8", "--no-prefix-cache"]
    _, engine, _ = run(*args, "--names", "a", "--names", "b")
    assert engine == Engine(device="cpu", max_num_seqs=8, prefix_cache=False, names=("a", "b"))
    assert run()[1] == Engine()


def test_help_shows_type_default_and_meaning() -> None:
    _, _, output = run("--help")
    text = " ".join(output.split())
    assert "--device auto|cpu Where it runs. [default: auto]" in text
    assert "--max-num-seqs INTEGER Most sequences in one step. [default: 0; ≥ 0, ≤ 4096]" in text
    assert "--prefix-cache / --no-prefix-cache [default: on]" in text


def test_a_wrong_value_is_refused_by_its_flag() -> None:
    assert "--max-num-seqs: expected `int` <= 4096" in run("--max-num-seqs", "5000")[2]


def test_an_error_says_what_to_do_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    @cli.debug_option
    def broken() -> None:
        raise InvalidModel("no config.json in /nowhere", hint="give a checkpoint's folder")

    monkeypatch.setattr(cli.cli, "get_command", lambda _ctx, _name: broken)
    assert exit_of(capsys, "broken") == (
        2,
        "",
        "naiad: no config.json in /nowhere\n  give a checkpoint's folder\n",
    )
    assert "Traceback" in exit_of(capsys, "broken", "--debug")[2]


def test_an_unknown_command_or_option_points_to_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = exit_of(capsys, "sevre")
    assert code == 2
    assert error.startswith("naiad: No such command 'sevre'")
    assert "naiad --help" in error


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(capsys, "--version") == (0, f"naiad {naiad.__version__}\n", "")
    code, output, _ = exit_of(capsys, "--help")
    assert code == 0
    for name, (_, text) in cli.COMMANDS.items():
        assert name in output
        assert text in output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_group_describes_commands_as_they_describe_themselves(name: str) -> None:
    pytest.importorskip("torch")
    module, text = cli.COMMANDS[name]
    command = importlib.import_module(module).command
    assert command.name == name
    assert command.short_help == text
    assert (command.help or "").startswith(text)


def test_no_two_sections_have_a_setting_of_the_same_name() -> None:
    from naiad.cli.settings import Settings as Real
    from naiad.core.settings import sections

    names = [setting.name for part in sections(Real).values() for setting in part]
    assert len(names) == len(set(names))


def test_naiad_exports_are_imported_when_used() -> None:
    assert naiad.SamplingParams is sys.modules["naiad.core.generation"].SamplingParams
    assert dir(naiad) == ["LLM", "SamplingParams", "__version__"]
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        naiad.Nothing  # noqa: B018 - the access is the test
