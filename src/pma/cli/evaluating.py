"""`pma eval` and `pma report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pma import verbs
from pma.cli import options as flags
from pma.cli.on_ray import ModelsPerNode, On, RayAddress, evaluating, on_ray
from pma.cli.output import command, note, say, table
from pma.engine import SNAPSHOTS
from pma.errors import UsageError
from pma.verbs import Candidate, Choice

if TYPE_CHECKING:
    from pma.evaluation.evaluate import Evaluation
    from pma.evaluation.tasks import TaskResult

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
    use: flags.Use = SNAPSHOTS,
    annealed: Annotated[
        Path | None, typer.Option("--annealed", help="An annealed checkpoint: adds the gain recovered.")
    ] = None,
    cloze: flags.Cloze = 400,
    context: flags.Context = None,
    tasks: flags.Tasks = None,
    limit: flags.TaskLimit = None,
    weights: flags.TaskWeights = None,
    threads: flags.Threads = 2,
    on: On = None,
    ray_address: RayAddress = None,
    per_node: ModelsPerNode = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Held-out loss, bits per byte and a cloze task of checkpoints, or of a window merged in memory; or
    scores on tasks.

    The first model is the baseline that the others are paired with; with --merge it is the window's newest
    checkpoint. Text defaults to what the run held out, or with --tasks to none.

    Example: pma eval run/checkpoint-1500 merged annealed/checkpoint-1800 --text held_out.txt

    Example: pma eval run --merge --last 10 --scheme sma,wma --tasks evals/blimp.jsonl,hellaswag
    """
    if weights is not None and not tasks:
        raise UsageError("--weights weighs --tasks, of which there are none")
    ray = on_ray(on, ray_address, per_node)
    candidates = _candidates(
        sources, merge, scheme, use, annealed, {"last": last, "every": every, "at": at, "preset": preset}
    )
    documents = verbs.held_out_documents(text or (), sources[0]) if text or not tasks else []
    if documents and len(documents) < _FEW_DOCUMENTS:
        note(f"only {len(documents)} held-out documents: errors over so few are rough")
    with flags.prepared_tasks(tasks, limit, weights) as (ready, shares):
        what = [f"{len(documents)} documents"] if documents else []
        what += [f"{len(ready)} task{'' if len(ready) == 1 else 's'}"] if ready else []
        with evaluating(ray, threads=threads, per_node=per_node, as_json=json_output) as engines:
            evaluations, scored = verbs.evaluate_with_tasks(
                [replace(each, options=replace(each.options, threads=threads)) for each in candidates],
                documents,
                ready,
                cloze=cloze,
                context_tokens=context,
                announce=lambda name: note(f"evaluating {name} on {' and '.join(what)}"),
                measuring=None if ray is None else engines.measuring,
            )
    names = [candidate.name for candidate in candidates]
    result = _text_result(evaluations, annealed is not None, show=not json_output) if documents else {}
    if ready:
        result |= _task_result(names, scored, shares, show=not json_output)
    return result


def _candidates(
    sources: list[Path], merge: bool, scheme: str, use: str, annealed: Path | None, window: dict[str, Any]
) -> list[Candidate]:
    if merge:
        candidates = merge_candidates(flags.choice(sources, **window), scheme.split(","), use)
    else:
        if use != SNAPSHOTS:
            raise UsageError(f"--use {use} goes with --merge")
        if any(value is not None and value is not False for value in window.values()):
            raise UsageError("--last, --every, --at and --preset go with --merge")
        candidates = [Candidate(name=str(path), choice=checkpoint_choice(path)) for path in sources]
    if annealed is not None:
        candidates.append(Candidate(name=str(annealed), choice=checkpoint_choice(annealed)))
    return candidates


def _text_result(evaluations: list[Evaluation], annealed: bool, *, show: bool) -> dict[str, Any]:
    from pma.evaluation.compare import compare

    rows = [row.to_json() for row in compare(evaluations, evaluations[-1] if annealed else None)]
    if show:
        from pma.cli.comparison import show_comparison

        show_comparison(rows)
    return {"comparison": rows, "evaluations": [evaluation.to_json() for evaluation in evaluations]}


def _task_result(
    names: list[str], scored: list[list[TaskResult]], weights: Mapping[str, float], *, show: bool
) -> dict[str, Any]:
    from pma.evaluation.tasks.compare import compare_tasks

    rows = compare_tasks(names, scored, weights)
    if show:
        from pma.reporting import tasks_table

        table(*tasks_table(rows))
    models = [
        {"name": name, "tasks": [result.to_json() for result in results]}
        for name, results in zip(names, scored, strict=True)
    ]
    return {"task_comparison": rows, "task_results": models}


def checkpoint_choice(path: Path) -> Choice:
    """A checkpoint by itself; a run stands for its newest."""
    return Choice(paths=(verbs.newest(path),))


def merge_candidates(choice: Choice, schemes: list[str], use: str = SNAPSHOTS) -> list[Candidate]:
    """The window's newest checkpoint, and the window merged by each scheme."""
    _, points = choice.points()
    last = Candidate(name=f"last ({points[-1].path.name})", choice=checkpoint_choice(points[-1].path))
    ways = {scheme: flags.merge_options(scheme, use=use) for scheme in schemes}
    named = " of interval means" if use != SNAPSHOTS else ""
    return [last, *(Candidate(name=s + named, choice=choice, options=how) for s, how in ways.items())]


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
