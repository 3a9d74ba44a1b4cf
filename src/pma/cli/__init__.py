"""The command `pma`: parse, call one verb, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

from pma import __version__
from pma.cli import (
    diagnosing,
    evaluating,
    forecasting,
    inspecting,
    merging,
    restarting,
    spikes,
    studying,
    sweeping,
    training,
    watching,
)
from pma.cli.output import say
from pma.errors import Interrupted

_LIBRARY_INTERRUPTED = 130

app = typer.Typer(
    name="pma",
    help="Average the checkpoints of one pre-training run: about as good as annealing it, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
training.register_demo(app)
inspecting.register(app)
merging.register(app)
sweeping.register(app)
evaluating.register(app)
spikes.register(app)
diagnosing.register(app)
forecasting.register(app)
training.register(app)
restarting.register(app)
watching.register(app)
studying.register(app)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"pma-llm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of `pma` itself; `--version` ends in its own callback, before a command is missed."""


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be valid text
    # a scheduler's SIGTERM and a lost terminal end a command as tidily as Ctrl-C
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_status)
    except SystemExit as stop:
        # an interrupt between our own lines reaches the command line library, which has a status of its own
        sys.exit(Interrupted.exit_status if stop.code == _LIBRARY_INTERRUPTED else stop.code)
