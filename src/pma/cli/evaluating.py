"""`pma eval` and `pma report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pma import verbs
from pma.cli import options as flags
from pma.cli.output import command, note, say
from pma.errors import UsageError
from pma.verbs import Candidate, Choice

_FEW_DOCUMENTS = 10


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("eval", short_help="Held-out loss of checkpoints or unwritten merges.")(command(evaluate))
    app.command("report", short_help="The HTML report of a demo or run, again.")(command(report))


def evaluate(
    sources: flags.Sources,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Held-out text: files or folders, also .xz.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Evaluate a window of the run, merged in memory.")
    ] = False,
    last: flags.Last = None,
    every: flags.Every = None,
    at: flags.At = None,
    preset: flags.UsePreset = False,
    scheme: Annotated[
        str, typer.Option("--scheme", help="With --merge: one scheme, or several with commas.")
    ] = "sma",
    annealed: Annotated[
        Path | None, typer.Option("--annealed", help="An annealed checkpoint: adds the gain recovered.")
    ] = None,
    cloze: Annotated[int, typer.Option("--cloze", min=0, help="Number of cloze items; 0 for none.")] = 400,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens the model looks at; its own by default.")
    ] = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Held-out loss, bits per byte and a cloze task of checkpoints, or of a window merged in memory.

    The first model is the baseline that the others are paired with; with --merge it is the window's newest
    checkpoint. Text defaults to what the run held out.

    Example: pma eval run/checkpoint-1500 merged annealed/checkpoint-1800 --text held_out.txt

    Example: pma eval run --merge --last 10 --scheme sma,wma,ema:0.2
    """
    from pma.evaluation.compare import compare

    if merge:
        choice = flags.choice(sources, last=last, every=every, at=at, preset=preset)
        candidates = merge_candidates(choice, scheme.split(","))
    else:
        if last is not None or every is not None or at is not None or preset:
            raise UsageError("--last, --every, --at and --preset go with --merge")
        candidates = [Candidate(name=str(path), choice=checkpoint_choice(path)) for path in sources]
    if annealed is not None:
        candidates.append(Candidate(name=str(annealed), choice=checkpoint_choice(annealed)))
    documents = verbs.held_out_documents(text or (), sources[0])
    if len(documents) < _FEW_DOCUMENTS:
        note(f"only {len(documents)} held-out documents: errors over so few are rough")
    evaluations = verbs.evaluate(
        candidates,
        documents,
        cloze=cloze,
        context_tokens=context,
        announce=lambda name: note(f"evaluating {name} on {len(documents)} documents"),
    )
    rows = [row.to_json() for row in compare(evaluations, evaluations[-1] if annealed is not None else None)]
    if not json_output:
        from pma.cli.comparison import show_comparison

        show_comparison(rows)
    return {"comparison": rows, "evaluations": [evaluation.to_json() for evaluation in evaluations]}


def checkpoint_choice(path: Path) -> Choice:
    """A checkpoint by itself; a run stands for its newest."""
    return Choice(paths=(verbs.newest(path),))


def merge_candidates(choice: Choice, schemes: list[str]) -> list[Candidate]:
    """The window's newest checkpoint, and the window merged by each scheme."""
    _, points = choice.points()
    last = Candidate(name=f"last ({points[-1].path.name})", choice=checkpoint_choice(points[-1].path))
    return [last, *(Candidate(name=s, choice=choice, options=flags.merge_options(s)) for s in schemes)]


def report(
    folder: Annotated[Path, typer.Argument(help="A demo folder, or a run.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to put it; in the folder by default.")
    ] = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """The HTML report of a demo folder or of a run, again: self-contained, opens offline, with PNGs
    beside it.

    Example: pma report demo
    """
    from pma.reporting import report_folder

    page, pictures = report_folder(folder, out or folder)
    if not json_output:
        say(f"Report: {page}")
        for picture in pictures:
            say(f"  {picture}")
    return {"report": str(page), "pictures": [str(picture) for picture in pictures]}
