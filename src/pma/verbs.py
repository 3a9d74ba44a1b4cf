"""The verbs that commands, the demo and Python users share: each names checkpoints, picks a window, calls
one room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma import engine, logs, restart, trajectory
from pma.choosing import Choice, suggestion
from pma.engine import Merge, MergeOptions, Plan
from pma.engine.provenance import RECORD_FILE, load
from pma.errors import InputError, UsageError
from pma.evaluation.text import Document, read_documents
from pma.inspecting import inspect
from pma.remote import location
from pma.restart import Restart
from pma.trajectory import Window

if TYPE_CHECKING:
    from torch import Tensor

    from pma.analysis.keeping import Budget
    from pma.analysis.looking import Look
    from pma.diagnosis.diagnosing import Diagnosis, Reading
    from pma.evaluation.evaluate import Evaluation
    from pma.evaluation.making import Measuring
    from pma.evaluation.tasks import Task, TaskResult

__all__ = [
    "HELD_OUT",
    "Candidate",
    "Choice",
    "Merge",
    "MergeOptions",
    "Plan",
    "Restart",
    "Window",
    "average",
    "check_look",
    "diagnose",
    "evaluate",
    "evaluate_with_tasks",
    "held_out_documents",
    "init",
    "inspect",
    "look",
    "merge",
    "newest",
    "newest_by_default",
    "plan",
    "plan_init",
    "suggestion",
]

HELD_OUT = Path("text") / "held_out.txt"


def plan(choice: Choice, options: MergeOptions | None = None) -> Plan:
    """What merging `choice` would do. Raises UsageError or InputError for everything that can be foreseen."""
    found, points = choice.points()
    return engine.plan(points, options, as_given=choice.as_given, left_out=found.left_out)


def merge(choice: Choice, out: Path, options: MergeOptions | None = None, **how: Any) -> Merge:
    """Merge `choice` into the new folder `out`; `how` as in `engine.write`."""
    with plan(choice, options) as planned:
        return engine.write(planned, out, **how)


def plan_init(
    choice: Choice,
    options: MergeOptions | None = None,
    *,
    optimizer: str = "newest",
    purpose: str = "resume",
    before_step: int | None = None,
) -> Plan:
    """What `init` would write; see there."""
    if before_step is not None:
        if choice.window is None:
            raise UsageError("--before-step ends a window of --last N checkpoints of a run")
        choice = replace(choice, window=replace(choice.window, before=before_step))
    found, points = choice.points()
    return restart.planned(
        points,
        options or MergeOptions(),
        optimizer=optimizer,
        purpose=purpose,
        as_given=choice.as_given,
        left_out=found.left_out,
    )


def init(
    choice: Choice,
    out: Path,
    *,
    optimizer: str = "newest",
    purpose: str = "resume",
    before_step: int | None = None,
    options: MergeOptions | None = None,
    **how: Any,
) -> Restart:
    """Merge `choice` into the new folder `out` so that the run's own trainer goes on from it.

    `optimizer`: what becomes of moments: `newest`, `second-moment` (first zero), `average`, `reset` (zero).
    `purpose`: `resume`, or `sft` or `ct` for weights alone. `before_step`: the window ends before it. `how`
    as in `engine.write`.
    """
    with plan_init(choice, options, optimizer=optimizer, purpose=purpose, before_step=before_step) as planned:
        return restart.write(planned, out, optimizer=optimizer, purpose=purpose, **how)


def newest_by_default(choice: Choice) -> Choice:
    """`choice` as a diagnosis takes it: across phases, which are told of and not refused; of a run without a
    window the newest checkpoints, `MOST_BY_DEFAULT` at most.
    """
    from pma.diagnosis.diagnosing import MOST_BY_DEFAULT

    choice = replace(choice, allow_mixed_phases=True)
    if not _is_run(choice) or choice.window is not None or choice.preset:
        return choice
    found = trajectory.resolve(choice.paths, as_given=choice.as_given, pattern=choice.pattern)
    upto = [p for p in found.points if choice.at is None or p.step is None or p.step <= choice.at]
    window = Window(last=min(max(len(upto), 1), MOST_BY_DEFAULT), at=choice.at)
    return replace(choice, window=window, at=None)


def _is_run(choice: Choice) -> bool:
    return choice.pattern is not None or not trajectory.is_checkpoint(choice.paths[0])


def look(
    choice: Choice,
    documents: Sequence[Document],
    options: MergeOptions | None = None,
    *,
    budget: Budget | None = None,
    progress: Callable[[float, str], None] = lambda share, words: None,
) -> Look:
    """Look around the merge of `choice` with held-out `documents`: the line from last through it, slopes and
    curvatures, the plane, routing of experts. See `pma.analysis.looking`.
    """
    from pma.analysis import looking

    _, points = choice.points()
    how: dict[str, Any] = {"as_given": choice.as_given, "budget": budget}
    return looking.look(points, documents, options, **how, progress=progress)


def check_look(
    choice: Choice,
    documents: Sequence[Document],
    options: MergeOptions | None = None,
    *,
    budget: Budget | None = None,
) -> None:
    """All that `look` would raise before it reads a tensor."""
    from pma.analysis import looking

    _, points = choice.points()
    looking.check(points, documents, options, as_given=choice.as_given, budget=budget)


def average(choice: Choice, options: MergeOptions | None = None) -> dict[str, Tensor]:
    """Merge `choice` in memory: tensors by name."""
    with plan(choice, options) as planned:
        return engine.average(planned)


def diagnose(
    choice: Choice,
    options: MergeOptions | None = None,
    *,
    log: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    reading: Reading | None = None,
) -> Diagnosis:
    """What the checkpoints and the log say about merging them; each checkpoint is read once.

    Of a run without a window the newest checkpoints are taken, `MOST_BY_DEFAULT` at most. `log`: the
    training log, where it is not in the run's folder. `reading`: reads the checkpoints, by default here.
    Raises InputError for a single checkpoint.
    """
    from pma.diagnosis.diagnosing import diagnose as diagnosed
    from pma.engine.gram import inner_products

    choice, is_run = newest_by_default(choice), _is_run(choice)
    curves = None
    try:
        curves = logs.read(log or (choice.paths[0] if is_run else choice.paths[-1].parent))
    except (InputError, UsageError):
        if log is not None:
            raise
    with plan(choice, options) as planned:
        return diagnosed(planned, curves, progress=progress, reading=reading or inner_products)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model to evaluate: a checkpoint, or a merge that is not written."""

    name: str
    choice: Choice
    options: MergeOptions = field(default_factory=MergeOptions)


def evaluate(
    candidates: Sequence[Candidate],
    documents: Sequence[Document],
    *,
    cloze: int = 400,
    context_tokens: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> list[Evaluation]:
    """Evaluate each candidate on the same documents, one after the other; `announce` is told whose turn it
    is.
    """
    how: dict[str, Any] = {"cloze": cloze, "context_tokens": context_tokens, "announce": announce}
    return evaluate_with_tasks(candidates, documents, (), **how)[0]


def evaluate_with_tasks(
    candidates: Sequence[Candidate],
    documents: Sequence[Document],
    tasks: Sequence[Task],
    *,
    cloze: int = 400,
    context_tokens: int | None = None,
    announce: Callable[[str], None] | None = None,
    measuring: Measuring | None = None,
) -> tuple[list[Evaluation], list[list[TaskResult]]]:
    """Each candidate's evaluation on `documents` (none if there are none), and its results on `tasks`.

    A model is made once for both. `tasks` as in `pma.evaluation.tasks.prepared`. `measuring`: has all models
    measured elsewhere; by default here, one after the other.
    """
    from pma.evaluation.making import Wanted, measured
    from pma.evaluation.measures import TEXT, task_measure, task_name, text_measure

    measures = [task_measure(task, context_tokens=context_tokens) for task in tasks]
    if documents:
        measures.insert(0, text_measure(documents, cloze=cloze, context_tokens=context_tokens))
    found: list[dict[str, Any]] = [{} for _ in candidates]

    def run(numbers: Sequence[int], measuring: Measuring, begun: Callable[[str], None]) -> None:
        with ExitStack() as opened:
            asked = [candidates[number] for number in numbers]
            plans = [opened.enter_context(plan(each.choice, each.options)) for each in asked]
            measuring(
                [
                    Wanted(plan=planned, name=each.name, measures=measures)
                    for planned, each in zip(plans, asked, strict=True)
                ],
                lambda place, measure, result: found[numbers[place]].update({measure.name: result}),
                context_tokens=context_tokens,
                begun=lambda place: begun(asked[place].name),
            )

    if measuring is not None:
        run(range(len(candidates)), measuring, announce or (lambda name: None))
    else:
        for number, candidate in enumerate(candidates):
            if announce is not None:
                announce(candidate.name)
            run([number], measured, lambda name: None)
    evaluations = [results[TEXT] for results in found] if documents else []
    return evaluations, [[results[task_name(task.name)] for task in tasks] for results in found]


def held_out_documents(texts: Sequence[Path], path: Path) -> list[Document]:
    """The documents to evaluate on: `texts`, else what the run that `path` belongs to held out."""
    if texts:
        return read_documents(texts)
    for folder in (path, path.parent, *_source_runs(path)):
        if (folder / HELD_OUT).is_file():
            return read_documents([folder / HELD_OUT])
    raise InputError(
        f"{path} does not belong to a run that holds text out; give held-out text with --text FILE"
    )


def _source_runs(path: Path) -> list[Path]:
    if not (path / RECORD_FILE).is_file():
        return []
    return [location(str(load(path)["sources"][-1].get("path"))).parent]


def newest(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest complete checkpoint of that run."""
    return trajectory.resolve([path]).points[-1].path
