"""The verbs that commands, the demo and Python users share: each names checkpoints, picks a window, calls
one room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma import engine, formats, restart, trajectory
from pma.engine import Merge, MergeOptions, Plan
from pma.engine.provenance import RECORD_FILE, load
from pma.errors import InputError, UsageError
from pma.evaluation.text import Document, read_documents
from pma.formats import interval_mean
from pma.quantities import Tokens, distance_flag
from pma.remote import location
from pma.restart import Restart
from pma.trajectory import Phase, Preset, Trajectory, TrajectoryPoint, Window

if TYPE_CHECKING:
    from torch import Tensor

    from pma.evaluation.evaluate import Evaluation
    from pma.evaluation.tasks import Task, TaskResult

HELD_OUT = Path("text") / "held_out.txt"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which checkpoints to average: runs or checkpoints, and for runs a window. `preset` sizes it as the
    paper did.
    """

    paths: tuple[Path, ...]
    window: Window | None = None
    preset: bool = False
    at: int | None = None
    as_given: bool = False
    pattern: str | None = None
    allow_mixed_phases: bool = False

    def points(self) -> tuple[Trajectory, tuple[TrajectoryPoint, ...]]:
        """The trajectory and the chosen checkpoints, oldest first. Raises UsageError where no window is
        given.
        """
        found = trajectory.resolve(self.paths, as_given=self.as_given, pattern=self.pattern)
        explicit = self.pattern is None and trajectory.is_checkpoint(self.paths[0])
        window = self.window
        if explicit and (window is not None or self.preset or self.at is not None):
            raise UsageError(
                "--last, --every, --at and --preset choose from a run; these are checkpoints named one by one"
            )
        if self.preset and window is None:
            window = preset_window(found, at=self.at)
        if window is None and not explicit:
            raise UsageError(f"which checkpoints of the run? Say --last N, or --preset. {suggestion(found)}")
        if window is None:
            return found, trajectory.of_one_phase(found.points, allow_mixed=self.allow_mixed_phases)
        return found, trajectory.select(found, replace(window, allow_mixed_phases=self.allow_mixed_phases))


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


def average(choice: Choice, options: MergeOptions | None = None) -> dict[str, Tensor]:
    """Merge `choice` in memory: tensors by name."""
    with plan(choice, options) as planned:
        return engine.average(planned)


def preset_window(found: Trajectory, *, at: int | None = None) -> Window:
    """The paper's window for a model of this size. Raises UsageError where the run does not count its
    tokens.
    """
    size = _preset(found)
    if any(point.tokens is None for point in found.points):
        raise UsageError(
            "the paper's window is measured in tokens, which this run does not record; say --last N, and "
            "--every in steps"
        )
    return Window(last=size.last, every=Tokens(size.every_tokens), at=at)


def suggestion(found: Trajectory) -> str:
    """One sentence: the preset for this model's size, and how far to trust it."""
    size = _preset(found)
    notes = []
    if size.extrapolated:
        notes.append("extrapolated: the paper's models were of another size")
    if size.capped:
        notes.append("capped by the stable tokens seen")
    if any(point.tokens is None for point in found.points):
        notes.append("in tokens, which this run does not record: give --every in steps")
    every = distance_flag(Tokens(size.every_tokens))
    return (
        f"For this model's size the paper suggests --last {size.last} --every {every}"
        + (f" ({'; '.join(notes)})" if notes else "")
        + "."
    )


def _preset(found: Trajectory) -> Preset:
    with closing(formats.open_checkpoint(found.points[-1].path)) as reader:
        stable = [p.tokens for p in found.points if p.phase is Phase.STABLE and p.tokens is not None]
        size = trajectory.preset(
            engine.parameter_count(reader.tensors),
            mixture_of_experts=engine.is_mixture_of_experts(reader.tensors),
            stable_tokens=stable[-1] - stable[0] if len(stable) > 1 else None,
        )
    return trajectory.fitted(size, stable)


def inspect(path: Path, pattern: str | None = None) -> dict[str, Any]:
    """What a checkpoint or a run is, from headers and records alone, as plain values.

    A run has `checkpoints`, `left_out` and `suggestion`; a checkpoint has `format`, `step`, `tokens`,
    `tensors` and so on.
    """
    if pattern is not None or (path.is_dir() and not trajectory.is_checkpoint(path)):
        return _inspect_run(path, pattern)
    with closing(formats.open_checkpoint(path)) as reader:
        meta, identities, specs = formats.read_meta(path), reader.identities(), reader.tensors.values()
        return {
            "path": str(path),
            "real_path": str(path.resolve()),
            "format": reader.format,
            "merge_of": _merged_from(path),
            "interval_mean": _mean_beside(path),
            "step": meta.step,
            "tokens": meta.tokens,
            "tokens_source": meta.tokens_source,
            "learning_rate": meta.learning_rate,
            "complete": meta.incomplete is None,
            "incomplete_because": meta.incomplete,
            "parameters": engine.parameter_count(reader.tensors),
            "mixture_of_experts": engine.is_mixture_of_experts(reader.tensors),
            "bytes": sum(identity.size_bytes for identity in identities),
            "files": [identity.name for identity in identities],
            "dtypes": dict(Counter(spec.dtype.name for spec in specs)),
            "tensors": [
                {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "role": s.role.value}
                for s in specs
            ],
        }


def _inspect_run(path: Path, pattern: str | None) -> dict[str, Any]:
    found = trajectory.discover([path], pattern)
    return {
        "path": str(path),
        "checkpoints": [point.describe() for point in found.points],
        "left_out": [{"path": str(where), "reason": reason} for where, reason in found.left_out],
        "interval_means_beside": engine.stored_beside(found.points),
        "suggestion": _suggestion_or_why_not(found),
    }


def _suggestion_or_why_not(found: Trajectory) -> str:
    try:
        return suggestion(found)
    except InputError as error:
        return f"No window is suggested: {error}"


def _merged_from(path: Path) -> dict[str, Any] | None:
    """Scheme and steps of a merge of ours, from its record."""
    if not (path / RECORD_FILE).is_file():
        return None
    record = load(path)
    steps = [source.get("step") for source in record["sources"]]
    return {
        "scheme": str(record.get("scheme")),
        "use": str(record.get("use", engine.SNAPSHOTS)),
        "steps": [s if isinstance(s, int) else None for s in steps],
    }


def _mean_beside(path: Path) -> dict[str, Any] | None:
    """What the mean that is stored beside a checkpoint is of, or why that cannot be told."""
    try:
        found = interval_mean.find(path)
        return asdict(interval_mean.read_record(found)) if found is not None else None
    except InputError as error:
        return {"unusable_because": str(error)}


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
) -> tuple[list[Evaluation], list[list[TaskResult]]]:
    """Each candidate's evaluation on `documents` (none if there are none), and its results on `tasks`.

    A model is made once for both. `tasks` as in `pma.evaluation.tasks.prepared`.
    """
    from pma.evaluation.evaluate import evaluate as evaluate_one
    from pma.evaluation.model import load_scorer
    from pma.evaluation.tasks import run_task

    evaluations, results = [], []
    for candidate in candidates:
        if announce is not None:
            announce(candidate.name)
        with plan(candidate.choice, candidate.options) as planned:
            tensors = engine.average(planned)
            like = planned.sources[-1].point.path
        scorer = load_scorer(tensors, like, context_tokens=context_tokens)
        if documents:
            evaluations.append(evaluate_one(candidate.name, scorer, documents, cloze=cloze))
        results.append([run_task(scorer, task) for task in tasks])
    return evaluations, results


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
