"""How commands speak: results on stdout (a table, or one JSON object), everything else on stderr, errors
as a paragraph.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec

import typer

from pma.cli.launching import refuse_repeated
from pma.errors import Interrupted, PmaError

P = ParamSpec("P")


def command(function: Callable[P, dict[str, Any]]) -> Callable[P, None]:
    """Turn a function that prints people's output and returns the JSON into a command with tidy errors.

    The function prints only where its `json_output` argument is false. A result without anything in it is
    another process's to give.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("json_output"))
        try:
            refuse_repeated(function.__name__)
            result = function(*args, **kwargs)
        except PmaError as error:
            raise _failed(error, as_json) from None
        except KeyboardInterrupt:
            raise _failed(Interrupted("interrupted"), as_json) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output went away; there is nobody to tell
            raise typer.Exit(0) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _failed(PmaError(f"{where}{error.strerror or error}"), as_json) from None
        status = int(result.pop("exit_status", 0))
        if as_json and result:
            print(json.dumps(result))
        if status:
            raise typer.Exit(status)

    return run


def _failed(error: PmaError, as_json: bool) -> typer.Exit:
    print(f"pma: {error}", file=sys.stderr)
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": {"kind": kind, "message": str(error), "exit_status": error.exit_status}}))
    return typer.Exit(error.exit_status)


def say(text: str = "") -> None:
    """A line of the result."""
    print(text)


def note(text: str) -> None:
    """A line beside the result."""
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout. The first column is left-aligned, the others are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # a pipe has no width: nothing is cut or wrapped there
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)


@contextmanager
def progress(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr: call it with (amount done so far, a few words). Plain lines where stderr is no
    terminal.
    """
    if not sys.stderr.isatty():
        yield _plain_lines(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=total, words="")
        yield lambda done, words: bars.update(task, completed=done, words=words)


def _plain_lines(title: str, total: float) -> Callable[[float, str], None]:
    last = [time.monotonic()]

    def show(done: float, words: str) -> None:
        if time.monotonic() - last[0] >= 10:
            last[0] = time.monotonic()
            note(f"{title}: {100 * done / max(total, 1):.0f}% {words}")

    return show


def or_unknown(value: float | None) -> str:
    """A number as people read it, or that it is unknown."""
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
