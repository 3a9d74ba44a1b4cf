"""`pma watch`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pma import sweeping, trajectory, verbs
from pma.cli import options as flags
from pma.cli.output import command, note, say, table
from pma.errors import InputError, Interrupted, MissingExtra, UsageError
from pma.quantities import parse_distance
from pma.remote import RemotePath, location
from pma.results import Store
from pma.trajectory import KEPT_FOLDER, Growing

if TYPE_CHECKING:
    from pma.evaluation.tasks import Task
    from pma.evaluation.text import Document
    from pma.watch import Judge, Point, Wanted, Watch
    from pma.watch.outlets import Outlet
    from pma.watch.page_file import PageFile

_FOLDER = "watch"
_MEMORY = "2GiB"
_SHOWN = 15
_CLEAR = "\r\x1b[K"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("watch", short_help="Merge and evaluate each checkpoint as it is written.")(command(watch))


def watch(
    run: Annotated[
        Path,
        typer.Argument(
            parser=location,
            metavar="RUN",
            help="The folder a trainer saves into; also a URL.",
            show_default=False,
        ),
    ],
    last: Annotated[int, typer.Option("--last", metavar="N", help="Average up to N checkpoints.")] = 10,
    every: flags.Every = None,
    scheme: flags.SchemeName = "sma",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Held-out text; without --tasks, what the run held out."),
    ] = None,
    cloze: flags.Cloze = 400,
    context: flags.Context = None,
    tasks: flags.Tasks = None,
    limit: flags.TaskLimit = None,
    weights: flags.TaskWeights = None,
    each: Annotated[
        int, typer.Option("--every-checkpoint", min=1, metavar="N", help="Evaluate each Nth checkpoint.")
    ] = 1,
    once: Annotated[
        bool, typer.Option("--once", help="Evaluate what is there and end, instead of waiting for more.")
    ] = False,
    poll: Annotated[
        float, typer.Option("--poll", min=0.1, metavar="SECONDS", help="How often to look for checkpoints.")
    ] = 2.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="For page and scalars; RUN/watch by default."),
    ] = None,
    keep_window: Annotated[
        bool, typer.Option("--keep-window", help="Keep the window's checkpoints by hard links.")
    ] = False,
    wandb: Annotated[
        str | None, typer.Option("--wandb", metavar="PROJECT", help="Send points to Weights & Biases too.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Serve the page on 127.0.0.1; 0 for any free port."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="FILE", help="Where results are kept; as for pma sweep by default."),
    ] = None,
    pattern: flags.Pattern = None,
    allow_mixed_phases: flags.MixedPhases = False,
    threads: flags.Threads = 2,
    memory: Annotated[
        str, typer.Option("--memory", help="Budget for buffers and for merged models.")
    ] = _MEMORY,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Merge and evaluate each checkpoint of a run as its trainer completes it, until it is interrupted.

    Writes a page that reloads itself, and TensorBoard scalars. What is evaluated is kept: the same command
    goes on, and pma sweep finds its results.

    Example: pma watch run --last 10 --keep-window

    Example: pma watch run --tasks evals/ --limit 500 --every-checkpoint 5 --port 8000
    """
    from pma.watch import Keeper, Watch, settings_key
    from pma.watch import run as run_watch
    from pma.watch.alone import alone_in

    if weights is not None and not tasks:
        raise UsageError("--weights weighs --tasks, of which there are none")
    if trajectory.is_checkpoint(run):
        raise UsageError(f"{run} is one checkpoint; give the run that its trainer saves into")
    wanted = _wanted(last, every, scheme, threads, memory, allow_mixed_phases=allow_mixed_phases)
    folder = out or (Path(_FOLDER) if isinstance(run, RemotePath) else run / _FOLDER)
    kept = out / KEPT_FOLDER.name if out is not None else run / KEPT_FOLDER
    growing = Growing(run, pattern, kept)
    documents = verbs.held_out_documents(text or (), run) if text or not tasks else []
    with ExitStack() as opened:
        ready, shares = opened.enter_context(flags.prepared_tasks(tasks, limit, weights))
        judge = _judge(documents, ready, shares, cloze, context)
        results = opened.enter_context(Store(store or sweeping.store_beside(run)))
        results.prepare()
        opened.enter_context(alone_in(folder))
        keeper = Keeper(run, kept) if keep_window else None
        page = _page(folder, port, opened)
        line = _StatusLine(run, as_json=json_output)
        made = Watch(
            growing,
            wanted,
            judge,
            results,
            each=each,
            keeper=keeper,
            outlets=_outlets(folder, wandb, run, settings_key(wanted, judge)),
            page=page,
            say=line.say,
            told=line.told,
        )
        interrupted = run_watch(made, poll_seconds=poll, once=once, sleep=lambda s: line.wait(made, s))
        return _result(made, page, interrupted=interrupted, as_json=json_output)


def _wanted(
    last: int, every: str | None, scheme: str, threads: int, memory: str, *, allow_mixed_phases: bool
) -> Wanted:
    from pma.watch import Wanted

    if last < 2:
        raise UsageError(f"--last {last}: a merge has at least two checkpoints")
    return Wanted(
        last=last,
        every=parse_distance(every) if every else None,
        scheme=scheme,
        allow_mixed_phases=allow_mixed_phases,
        options=flags.merge_options("sma", threads=threads, memory=memory),
    )


def _judge(
    documents: Sequence[Document],
    tasks: Sequence[Task],
    weights: dict[str, float],
    cloze: int,
    context: int | None,
) -> Judge:
    from pma.evaluation.measures import task_measure, text_measure
    from pma.watch import Judge

    measures = [task_measure(task, context_tokens=context) for task in tasks]
    if documents:
        measures.insert(0, text_measure(documents, cloze=cloze, context_tokens=context))
    return Judge(measures=measures, weights=weights, context_tokens=context)


def _page(folder: Path, port: int | None, opened: ExitStack) -> PageFile | None:
    """The page, also served where a port is given; None where it cannot be drawn."""
    from pma.watch.page_file import PageFile
    from pma.watch.serving import served

    try:
        page = PageFile(folder)
    except MissingExtra as missing:
        if port is not None:
            raise
        note(f"no page: {missing}")
        return None
    note(f"page: {page.path}")
    if port is not None:
        note(f"      {opened.enter_context(served(page.path, port))}")
    return page


def _outlets(folder: Path, wandb: str | None, run: Path, key: str) -> list[Outlet]:
    from pma.watch.outlets import TensorBoard, WeightsAndBiases

    outlets: list[Outlet] = []
    if wandb is not None:
        outlets.append(WeightsAndBiases(wandb, run, key))
    try:
        outlets.append(TensorBoard(folder / "tensorboard"))
    except MissingExtra as missing:
        note(f"no scalars: {missing}")
    return outlets


class _StatusLine:
    """What goes to stderr: a line a point; where it is a terminal, also what is waited for; with `as_json`
    one JSON object a point.
    """

    def __init__(self, run: Path, *, as_json: bool) -> None:
        self._run, self._as_json = run, as_json
        self._terminal = sys.stderr.isatty() and not as_json

    def say(self, text: str) -> None:
        note(f"{_CLEAR}{text}" if self._terminal else text)

    def told(self, point: Point) -> None:
        from pma.reporting import watch_lead

        if self._as_json:
            note(json.dumps({"event": "point", **point.to_json()}))
        else:
            self.say(watch_lead([point.to_json()]))

    def wait(self, watch: Watch, seconds: float) -> None:
        if self._terminal:
            there = watch.state(live=True)
            words = f"watching {self._run}: {there.checkpoints} checkpoints, {len(there.points)} points"
            sys.stderr.write(f"{_CLEAR}{words}; waiting for the next")
            sys.stderr.flush()
        time.sleep(seconds)


def _result(watch: Watch, page: PageFile | None, *, interrupted: bool, as_json: bool) -> dict[str, Any]:
    state = watch.state(live=False)
    if not interrupted and not state.points:
        raise watch.last_error or InputError(
            f"{state.run} holds no complete checkpoint yet; without --once it is waited for"
        )
    points = [point.to_json() for point in state.points]
    if not as_json and points:
        from pma.reporting import points_table

        table(*points_table(points[-_SHOWN:]))
    if not as_json:
        shown = f"; shown are the newest {_SHOWN}" if len(points) > _SHOWN else ""
        say(f"{len(points)} points, {len(watch.added)} of them new{shown}; all are in {watch.store.path}")
    if interrupted:
        note("stopped; the same command goes on")
    return {
        "run": str(state.run),
        "points": points,
        "left_behind": [point.to_json() for point in state.abandoned],
        "added": len(watch.added),
        "not_taken": [{"path": str(path), "reason": reason} for path, reason in state.waiting],
        "store": str(watch.store.path),
        "report": None if page is None else str(page.path),
        "interrupted": interrupted,
        "exit_status": Interrupted.exit_status if interrupted else 0,
    }
