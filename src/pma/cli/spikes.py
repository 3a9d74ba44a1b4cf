"""`pma spikes`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pma import trajectory
from pma.cli import options as flags
from pma.cli.output import command, note, say, table
from pma.errors import printable
from pma.logs import Breakaway
from pma.remote import location
from pma.trajectory import WayPast

_ALL_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command("spikes", short_help="Where loss or gradient norm broke away, and the way past.")(
        command(spikes)
    )


def spikes(
    path: Annotated[
        Path,
        typer.Argument(
            parser=location, metavar="RUN|LOG", help="A run, or a log of one.", show_default=False
        ),
    ],
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="LOG", help="The run's log, where it is not in the run's folder."),
    ] = None,
    last: Annotated[
        int, typer.Option("--last", metavar="N", min=1, help="Checkpoints to go back to, for pma init.")
    ] = 3,
    step_name: Annotated[
        str | None, typer.Option("--step-name", metavar="COLUMN", help="What the log calls the step.")
    ] = None,
    loss_name: Annotated[
        str | None, typer.Option("--loss-name", metavar="COLUMN", help="What it calls the loss.")
    ] = None,
    grad_norm_name: Annotated[
        str | None, typer.Option("--grad-norm-name", metavar="COLUMN", help="And the gradient norm.")
    ] = None,
    pattern: flags.Pattern = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Where the loss or the gradient norm of a run broke away, the checkpoints before, and how to get past.

    Reads trainer_state.json, TensorBoard's event files, JSON lines or CSV. Exit status 1 if any was found.

    Example: pma spikes runs/7b
    """
    given = {"step": step_name, "loss": loss_name, "grad_norm": grad_norm_name}
    names = {quantity: name for quantity, name in given.items() if name is not None}
    found = trajectory.spikes(path, log=log, names=names, pattern=pattern, last=last)
    if not json_output:
        _show(found, last)
    return {
        "run": str(found.run) if found.run is not None else None,
        "sources": [str(source) for source in found.curves.sources],
        "notes": list(found.curves.notes),
        "entries": len(found.curves.steps),
        "first_step": int(found.curves.steps[0]),
        "last_step": int(found.curves.steps[-1]),
        "breakaways": [_described(way, found.run, last) for way in found.ways_past],
        "left_out": [{"path": str(where), "reason": reason} for where, reason in found.left_out],
        "exit_status": 1 if found.ways_past else 0,
    }


def init_command(way: WayPast, run: Path | None, last: int) -> str | None:
    """The `pma init` that leads past a breakaway; None where there is no checkpoint before it."""
    if run is None or not way.checkpoints:
        return None
    name, count = str(run).rstrip("/"), min(last, len(way.checkpoints))
    out = f"{name}-before-{way.before_step}"
    parts = ["pma", "init", name, "-o", out, "--before-step", str(way.before_step), "--last", str(count)]
    return shlex.join(parts)


def _described(way: WayPast, run: Path | None, last: int) -> dict[str, Any]:
    found = way.breakaway
    return {
        "quantity": found.quantity,
        "kind": found.kind.value,
        "good_step": found.good_step,
        "first_step": found.first_step,
        "seen_step": found.seen_step,
        "peak_step": found.peak_step,
        "last_step": found.last_step,
        "entries": found.entries,
        "level": _finite(found.level),
        "peak": _finite(found.peak),
        "size_mads": _finite(found.size_mads),
        "before_step": way.before_step,
        "checkpoints": [str(point.path) for point in way.checkpoints],
        "reserve": way.reserve,
        "command": init_command(way, run, last),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _show(found: trajectory.Spikes, last: int) -> None:
    curves, ways = found.curves, found.ways_past
    sources = [printable(str(source)) for source in curves.sources]
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    note(f"log: {sources[0]}{more}")
    for text in curves.notes:
        note(printable(text, 400))
    if found.run is None:
        for where, reason in found.left_out:
            note(f"no checkpoints in {printable(str(where))}: {printable(reason, 400)}")
    span = f"{len(curves.steps)} entries, steps {int(curves.steps[0])} to {int(curves.steps[-1])}"
    if not ways:
        say(f"Nothing broke away in {span}.")
        return
    say(f"{len(ways)} breakaway{'' if len(ways) == 1 else 's'} in {span}.")
    table(
        ("what", "kind", "from step", "to", "peak at", "level", "peak", "MADs"),
        [_row(way.breakaway) for way in ways[:_ALL_SHOWN]],
    )
    if len(ways) > _ALL_SHOWN:
        note(f"{len(ways) - _ALL_SHOWN} more are in --json")
    for way in ways[:_ALL_SHOWN]:
        _show_way(way, found.run, last)


def _row(found: Breakaway) -> tuple[str, ...]:
    what = "gradient norm" if found.quantity == "grad_norm" else "loss"
    size = f"{found.size_mads:.0f}" if math.isfinite(found.size_mads) else "–"
    steps = (str(found.first_step), str(found.last_step), str(found.peak_step))
    return (what, found.kind.value, *steps, f"{found.level:.3g}", f"{found.peak:.3g}", size)


def _show_way(way: WayPast, run: Path | None, last: int) -> None:
    found = way.breakaway
    what = "gradient norm" if found.quantity == "grad_norm" else "loss"
    say(f"\n{what}, step {found.first_step}: {found.kind.words}")
    if run is None:
        say("  no run with checkpoints was found beside the log; name the run, with --log LOG")
        return
    if way.checkpoints:
        say(f"  checkpoints before: {', '.join(printable(p.path.name) for p in way.checkpoints)}")
    if way.reserve is not None:
        say(f"  but {printable(way.reserve, 400)}")
    line = init_command(way, run, last)
    if line is not None:
        say(f"  {line}")
