"""What a person sees while a model loads and once it is ready."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from naiad.engine.messages import Ready

_NEVER_FOLD = 10_000


class LoadingProgress:
    """A progress bar on stderr while a model loads; silent where stderr is no terminal.

    Call it with the fraction loaded and what is being done, as model loaders do.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task: TaskID = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, fraction: float, text: str) -> None:
        """Show progress."""
        self._bar.update(self._task, completed=fraction, description=text)


def startup_rows(names: Sequence[str], ready: Ready, urls: Iterable[str]) -> list[tuple[str, str]]:
    """What the start-up table says, row by row."""
    return [
        ("model", names[0]),
        *([("also called", ", ".join(names[1:]))] if names[1:] else []),
        ("architecture", f"{ready.architecture}, {_short(ready.num_parameters)} parameters"),
        ("dtype", ready.dtype),
        ("device", ready.device),
        ("context", f"{ready.max_model_len:,} tokens"),
        ("KV cache", f"{ready.kv_capacity_tokens:,} tokens, {ready.max_num_seqs} sequences"),
        *((f"memory: {what}", _bytes(size)) for what, size in ready.memory),
        *(("listening", url) for url in urls),
    ]


def print_startup(rows: Iterable[tuple[str, str]]) -> None:
    """Print the start-up table on stdout; logs go to stderr."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NEVER_FOLD)
    console.print(table)


def _short(number: int) -> str:
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
