"""`pma study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pma.cli import options as flags
from pma.cli.output import command, note, say, table
from pma.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command("study", short_help="The paper's figures and tables, run at a size for this machine.")(
        command(study)
    )


def study(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME…", help="Studies; all; or list.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of results.", show_default=False)
    ] = None,
    home: Annotated[
        Path, typer.Option("--home", help="Where training runs and measurements are kept, for all studies.")
    ] = Path("studies"),
    size: Annotated[str, typer.Option("--preset", help="cpu, gpu, or toy.")] = "cpu",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="How many; by default the study's own number.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of texts (docs/studies). Default: the Python standard library."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="How many runs at once, a core each.")] = 1,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Stop after so long; the same command goes on.")
    ] = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Only write README and figure again, from result.json.")
    ] = False,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Run studies of the paper's figures and tables: train what is missing, measure, write result.json,
    figure and README.

    Training runs are shared by studies and kept in --home. The same command goes on where it was stopped.

    Example: pma study list

    Example: pma study fig3 --preset cpu --seeds 3 -o results
    """
    from pma.studies.catalogue import STUDIES

    if names == ["list"]:
        if not json_output:
            table(
                ["study", "seeds", "what it asks"],
                [[s.name, str(s.seeds), f"{s.title} ({s.source})"] for s in STUDIES],
            )
        return {
            "studies": [
                {"name": s.name, "title": s.title, "claim": s.claim, "seeds": s.seeds} for s in STUDIES
            ]
        }
    if out is None:
        raise UsageError("where to? Such as: pma study fig3 -o results")
    from pma.studies import running

    request = running.Request(
        names=tuple(names),
        out=out,
        home=home,
        preset=size,
        seeds=seeds,
        data=data,
        jobs=jobs,
        minutes=minutes,
    )
    told = running.redraw(request) if redraw else running.run_studies(request, note)
    if not json_output:
        for each, what in told:
            say(f"{each.name}: {what.verdict}. {out / each.name / 'README.md'}")
            for finding in what.findings:
                say(f"  {finding.claim}: {finding.verdict.value}. {finding.evidence}")
    return {
        "studies": [
            {"name": each.name, "verdict": what.verdict, "folder": str(out / each.name)}
            for each, what in told
        ]
    }
