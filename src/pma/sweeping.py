"""`pma sweep`: a grid of windows and schemes, merged from few reads, evaluated or written.

Evaluations go into a store that is keyed by content, so that a repeated or wider sweep computes only what is
new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from blake3 import blake3

from pma import engine, trajectory
from pma.engine import SNAPSHOTS, MergeOptions, Plan
from pma.engine.provenance import check_unchanged
from pma.errors import FormatError, UsageError, printable
from pma.evaluation.measures import TEXT, Measure, task_name
from pma.formats.contracts import CheckpointReader
from pma.quantities import Steps, Tokens, parse_distance
from pma.remote import RemotePath
from pma.results import STORE_FILE, Store, content_key
from pma.trajectory import Trajectory, TrajectoryPoint, Window

if TYPE_CHECKING:
    from torch import Tensor

    from pma.evaluation.evaluate import Evaluation

# an Evaluation or a TaskResult by the name of its measure
Results = dict[str, Any]
# called with tensors by name, the checkpoint whose configuration and tokenizer they go with, context_tokens
Load = Callable[..., Any]


def store_beside(run: Path) -> Path:
    """Where results of a run are kept: in it, or, of a run in a store, in the working folder."""
    return STORE_FILE if isinstance(run, RemotePath) else run / STORE_FILE


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of these: numbers of checkpoints, distances, ends (a step; None is the newest),
    schemes.
    """

    lasts: tuple[int, ...]
    everys: tuple[Steps | Tokens | None, ...] = (None,)
    ats: tuple[int | None, ...] = (None,)
    schemes: tuple[str, ...] = ("sma",)
    allow_mixed_phases: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One merge of a grid. `plan`: its place in the sweep's plans, which cells of like content share."""

    scheme: str
    last: int
    every: Steps | Tokens | None
    at: int | None
    plan: int

    @property
    def name(self) -> str:
        """A name for people and for a folder."""
        every = "" if self.every is None else f"-every{_exact_text(self.every)}"
        return f"{self.scheme.replace(':', '-')}-last{self.last}{every}-at{self.at}"


def _exact_text(distance: Steps | Tokens) -> str:
    """As `8Btokens` where that is exact, else all digits: names must differ where distances do."""
    short = str(distance).replace(" ", "")
    if parse_distance(short) == distance:
        return short
    return f"{distance.count}{'steps' if isinstance(distance, Steps) else 'tokens'}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The cells of a grid and their distinct plans; `skipped` says which windows the run does not have, and
    why.

    `raw`: for each end, the place of the plan that is the newest checkpoint alone: what merges are compared
    with.
    """

    cells: tuple[Cell, ...]
    plans: tuple[Plan, ...]
    keys: tuple[str, ...]
    raw: dict[int | None, int]
    skipped: tuple[str, ...]
    left_out: tuple[tuple[Path, str], ...]


@contextmanager
def planned(paths: Sequence[Path], grid: Grid, options: MergeOptions) -> Iterator[Sweep]:
    """Plan a grid over runs. Every checkpoint is opened once, and closed after the block.

    Raises UsageError where no window of the grid exists, and whatever planning a merge raises.
    """
    if trajectory.is_checkpoint(paths[0]):
        raise UsageError(f"{paths[0]} is a checkpoint; a sweep chooses windows from a run")
    with planned_over(trajectory.resolve(paths), grid, options) as sweep:
        yield sweep


@contextmanager
def planned_over(found: Trajectory, grid: Grid, options: MergeOptions) -> Iterator[Sweep]:
    """As `planned`, over checkpoints that were found before."""
    opened: dict[Path, CheckpointReader] = {}
    try:
        yield _Planner(found, grid, options, opened).sweep()
    finally:
        for reader in opened.values():
            reader.close()


class _Planner:
    """Makes each distinct plan once."""

    def __init__(
        self, found: Trajectory, grid: Grid, options: MergeOptions, opened: dict[Path, CheckpointReader]
    ) -> None:
        self._found, self._grid, self._options, self._opened = found, grid, options, opened
        self._plans: list[Plan] = []
        self._places: dict[str, int] = {}

    def sweep(self) -> Sweep:
        cells, skipped = [], []
        raw: dict[int | None, int] = {}
        for at, every, last in self._windows():
            window = Window(last=last, every=every, at=at, allow_mixed_phases=self._grid.allow_mixed_phases)
            try:
                points = trajectory.select(self._found, window)
                if self._options.uses_means:
                    engine.located_means(points)
            except UsageError as error:
                skipped.append(str(error))
                continue
            end = points[-1].step
            raw.setdefault(end, self._place(points[-1:], "sma", SNAPSHOTS))
            for scheme in self._grid.schemes:
                place = self._place(points, scheme, self._options.use)
                cells.append(Cell(scheme=scheme, last=last, every=every, at=end, plan=place))
        if not cells:
            raise UsageError("no window of the sweep exists: " + skipped[0])
        return Sweep(
            cells=tuple(cells),
            plans=tuple(self._plans),
            keys=tuple(self._places),
            raw=raw,
            skipped=tuple(skipped),
            left_out=tuple(self._found.left_out),
        )

    def _windows(self) -> list[tuple[int | None, Steps | Tokens | None, int]]:
        grid = self._grid
        return [(at, every, last) for at in grid.ats for every in grid.everys for last in grid.lasts]

    def _place(self, points: Sequence[TrajectoryPoint], scheme: str, use: str) -> int:
        plan = engine.plan(points, replace(self._options, scheme=scheme, use=use), opened=self._opened)
        place = self._places.setdefault(merge_key(plan), len(self._plans))
        if place == len(self._plans):
            self._plans.append(plan)
        return place


def merge_key(plan: Plan) -> str:
    """Tells merges apart by content: which files, weighed how, treated how. Not by where they lie."""
    options = plan.options
    # not said of snapshots, so that results of before there were means are still found
    use = {"use": options.use} if options.uses_means else {}
    return content_key(
        {
            **use,
            "sources": [[asdict(identity) for identity in source.files] for source in plan.sources],
            "weights": list(plan.weights),
            "dtype": options.dtype.name if options.dtype else None,
            "exclude": list(options.exclude),
            "copy": list(options.copy),
            "with_optimizer": options.with_optimizer,
            "allow_nonfinite": options.allow_nonfinite,
            "beside": {name: blake3(data).hexdigest() for name, data in plan.side_files.items()},
        }
    )


def targets(sweep: Sweep, folder: Path) -> dict[int, Path]:
    """For each plan the folder in `folder` that it is written to: cells of like content share the first one's
    name.
    """
    return {cell.plan: folder / cell.name for cell in reversed(sweep.cells)}


def unwritten(sweep: Sweep, folder: Path) -> list[tuple[Plan, Path]]:
    """What of the sweep is not in `folder` yet, made from the same plan."""
    places = sorted(targets(sweep, folder).items())
    return [(sweep.plans[p], out) for p, out in places if not engine.is_written(sweep.plans[p], out)]


def write(sweep: Sweep, folder: Path, **how: Unpack[engine.How]) -> list[tuple[Cell, Path]]:
    """Write what is not there yet of the cells' merges into folders of `folder`; `how` as in
    `engine.write`.
    """
    engine.sweep_to_folders(unwritten(sweep, folder), **how)
    out = targets(sweep, folder)
    return [(cell, out[cell.plan]) for cell in sweep.cells]


def evaluate(
    sweep: Sweep,
    measures: Sequence[Measure],
    store: Store,
    *,
    context_tokens: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
    begin: Callable[[Sequence[Plan]], None] = lambda plans: None,
    load: Load | None = None,
) -> tuple[dict[int, Results], int]:
    """Results by plan, of every cell and of the raw checkpoints, each by the measure's name; and how many of
    them were in the store already. `begin` hears once of the plans that lack any. `load`: makes what the
    measures score, by default `load_scorer`.
    """
    make = load or _load_scorer()
    store.prepare()
    done: dict[int, Results] = {place: {} for place in range(len(sweep.plans))}
    missing: dict[int, list[Measure]] = {}
    for place, merge in enumerate(sweep.keys):
        for measure in measures:
            known = store.get(merge, measure.key)
            if known is not None:
                done[place][measure.name] = _read_back(measure, known, store)
            else:
                missing.setdefault(place, []).append(measure)
    places = list(missing)

    def use(number: int, tensors: dict[str, Tensor]) -> None:
        place = places[number]
        plan, merge = sweep.plans[place], sweep.keys[place]
        announce(f"evaluating {number + 1} of {len(places)}")
        check_unchanged(plan)  # or a result would be kept under the name of what was there before
        scorer = make(tensors, plan.sources[-1].point.path, context_tokens=context_tokens)
        for measure in missing[place]:
            found = done[place][measure.name] = measure.run(merge[:12], scorer)
            store.put(merge, measure.key, merge=_described(plan), result=found.to_json())

    begin([sweep.plans[place] for place in places])
    if places:
        engine.sweep_in_memory([sweep.plans[place] for place in places], use)
    return done, len(sweep.plans) * len(measures) - sum(map(len, missing.values()))


def _load_scorer() -> Load:
    from pma.evaluation.model import load_scorer

    return load_scorer


def _read_back(measure: Measure, value: dict[str, Any], store: Store) -> Any:
    """A result from the store, which is a file like any other."""
    try:
        return measure.read(value)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{store.path} holds an evaluation that cannot be read ({printable(repr(error))}); "
            "remove the file, and it is computed again"
        ) from error


def _described(plan: Plan) -> dict[str, Any]:
    sources = [
        {"path": str(source.point.path), "step": source.point.step, "weight": source.weight}
        for source in plan.sources
    ]
    return {"scheme": plan.options.scheme, "use": plan.options.use, "sources": sources}


def rows(
    sweep: Sweep, results: Mapping[int, Results], weights: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One row for each cell, best first: what it is, and what was measured of it and of the raw checkpoint it
    ends with: loss, bits per byte and cloze where there is a text; the scores on the tasks of `weights`, and
    their mean.

    Gains over the raw checkpoint are paired, and positive where the merge is better.
    """
    made = []
    for cell in sweep.cells:
        own, raw = results[cell.plan], results[sweep.raw[cell.at]]
        row = {
            "scheme": cell.scheme,
            "last": cell.last,
            "every": "-" if cell.every is None else str(cell.every),
            "every_order": 0 if cell.every is None else cell.every.count,
            "at": cell.at,
            "steps": [source.point.step for source in sweep.plans[cell.plan].sources],
            "merge_key": sweep.keys[cell.plan],
        }
        if TEXT in own:
            row |= _text_values(own[TEXT], raw[TEXT])
        if weights:
            row |= _task_values(own, raw, weights)
        made.append(row)
    if made and "loss" in made[0]:
        return sorted(made, key=lambda row: row["loss"])
    return sorted(made, key=lambda row: -row["mean_score"])


def _text_values(own: Evaluation, raw: Evaluation) -> dict[str, Any]:
    from pma.evaluation.evaluate import loss_difference

    gain = loss_difference(raw, own)
    return {
        "loss": own.loss.value,
        "standard_error": own.loss.standard_error,
        "gain": gain.value,
        "gain_standard_error": gain.standard_error,
        "bits_per_byte": own.bits_per_byte,
        "cloze": own.cloze_accuracy,
    }


def _task_values(own: Results, raw: Results, weights: Mapping[str, float]) -> dict[str, Any]:
    from pma.evaluation.tasks import scores

    pairs = [(own[task_name(task)], raw[task_name(task)]) for task in weights]
    mean = scores.mean_score([mine for mine, _ in pairs], list(weights.values()))
    gain = scores.mean_difference(pairs, list(weights.values()))
    tasks = {}
    for task, (mine, last) in zip(weights, pairs, strict=True):
        score, better = scores.score(mine), scores.score_difference(mine, last)
        tasks[task] = {
            "metric": mine.metric,
            "score": score.value,
            "standard_error": score.standard_error,
            "gain": better.value,
            "gain_standard_error": better.standard_error,
        }
    return {
        "tasks": tasks,
        "mean_score": mean.value,
        "mean_score_standard_error": mean.standard_error,
        "mean_score_gain": gain.value,
        "mean_score_gain_standard_error": gain.standard_error,
    }
