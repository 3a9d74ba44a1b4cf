"""The command `pma`: parse, call one verb, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import signal
from types import FrameType

import typer

from pma.cli import evaluating, merging, training

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
merging.register(app)
evaluating.register(app)
training.register(app)


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command."""
    # a scheduler's SIGTERM ends a command as tidily as Ctrl-C
    signal.signal(signal.SIGTERM, _terminated)
    app()
