"""`pma inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pma import verbs
from pma.cli import options as flags
from pma.cli.interval_means import beside_text, record_text, sources_text
from pma.cli.output import command, note, or_unknown, say, table
from pma.errors import printable
from pma.quantities import bytes_text, count_text
from pma.remote import location


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command("inspect", short_help="What a run or checkpoint is.")(command(inspect))


def inspect(
    path: Annotated[
        Path,
        typer.Argument(parser=location, metavar="PATH", help="A run or a checkpoint.", show_default=False),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    pattern: flags.Pattern = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """What a run or checkpoint is: format, steps, tokens, lr, phases; tensors, parameters, types.

    Example: pma inspect runs/7b
    """
    result = verbs.inspect(path, pattern)
    if not json_output:
        if "checkpoints" in result:
            _show_run(result)
        else:
            _show_checkpoint(result, list_tensors=tensors)
    return result


def _show_checkpoint(result: dict[str, Any], *, list_tensors: bool) -> None:
    tokens = f"{count_text(result['tokens'])} ({result['tokens_source']})" if result["tokens"] else "unknown"
    made = result["merge_of"]
    kind = "mixture of experts" if result["mixture_of_experts"] else "dense"
    say(f"{result['real_path']}")
    say(f"  format      {result['format']}, {len(result['files'])} files, {bytes_text(result['bytes'])}")
    if made is not None:
        steps = (
            f"steps {made['steps'][0]} to {made['steps'][-1]}"
            if None not in made["steps"]
            else "steps unknown"
        )
        what = sources_text(made["use"])
        say(f"  merge       {printable(made['scheme'])} of {len(made['steps'])} {what}, {steps}")
    else:
        say(f"  complete    {'yes' if result['complete'] else 'no: ' + result['incomplete_because']}")
        say(f"  step        {or_unknown(result['step'])}")
        say(f"  tokens      {tokens}")
        say(f"  lr          {or_unknown(result['learning_rate'])}")
    if result["interval_mean"] is not None:
        say(f"  beside      {record_text(result['interval_mean'])}")
    say(f"  parameters  {count_text(result['parameters'])}, {kind}")
    say(
        f"  tensors     {len(result['tensors'])}: "
        + ", ".join(f"{n} {d}" for d, n in result["dtypes"].items())
    )
    if list_tensors:
        rows = [(printable(t["name"]), t["dtype"], str(tuple(t["shape"]))) for t in result["tensors"]]
        table(("tensor", "dtype", "shape"), rows)


def _show_run(result: dict[str, Any]) -> None:
    rows = [
        (
            Path(point["path"]).name,
            or_unknown(point["step"]),
            count_text(point["tokens"]) if point["tokens"] else "unknown",
            or_unknown(point["learning_rate"]),
            point["phase"],
        )
        for point in result["checkpoints"]
    ]
    table(("checkpoint", "step", "tokens", "lr", "phase"), rows, title=result["path"])
    for entry in result["left_out"]:
        note(f"left out: {entry['path']}: {entry['reason']}")
    if result["interval_means_beside"]:
        note(beside_text(result["interval_means_beside"], len(result["checkpoints"])))
    say(result["suggestion"])
