"""The `naiad` command: finds the subcommand, runs it, and turns errors into messages.

Subcommands are imported when they run, so that `naiad --help` is quick. A deliberate error prints
what happened and what to do on stderr and exits with 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from naiad import __version__
from naiad.core.errors import NaiadError

FAILURE = 2
INTERRUPTED = 130

COMMANDS = {
    "generate": ("naiad.cli.generate", "Continue a prompt with the model at PATH."),
    "serve": ("naiad.cli.serve", "Serve the model at PATH over HTTP."),
}
"""Module of each command, where it is called `command`, and the first line of its help."""

debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="Print tracebacks of errors."
)


class LazyGroup(click.Group):
    """A group that imports a command when it is asked for it by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names only."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="naiad", message="%(prog)s %(version)s")
@debug_option
def cli() -> None:
    """Naiad serves models, from one GPU to a fleet."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in `SystemExit`."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = cli.main(args, prog_name="naiad", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        help_wanted.show()
        code = FAILURE
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left. Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (NaiadError, click.ClickException) as error:
        if "--debug" in args:
            traceback.print_exc()
        click.echo(describe_error(error), err=True)
        code = FAILURE
    sys.exit(code or 0)


def describe_error(error: NaiadError | click.ClickException) -> str:
    """What happened, and below it what to do."""
    if isinstance(error, NaiadError):
        message, hint = str(error), error.hint
    else:
        message = error.format_message()
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"see {context.command_path} --help" if context else ""
    return f"naiad: {message}" + (f"\n  {hint}" if hint else "")
