"""`pma sweep`: a grid of windows and schemes, merged from few reads, evaluated or written.

Evaluations go into a store that is keyed by content, so that a repeated or wider sweep computes only what is
new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from blake3 import blake3

from pma import __version__, engine, trajectory
from pma.engine import MergeOptions, Plan
from pma.errors import FormatError, UsageError, printable
from pma.evaluation.text import Document
from pma.formats.contracts import CheckpointReader
from pma.quantities import Steps, Tokens, parse_distance
from pma.remote import RemotePath
from pma.results import Store, content_key
from pma.trajectory import Trajectory, TrajectoryPoint, Window

if TYPE_CHECKING:
    from torch import Tensor

    from pma.evaluation.evaluate import Evaluation

STORE_FILE = Path(".pma") / "results.sqlite"


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
    found = trajectory.resolve(paths)
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
            except UsageError as error:
                skipped.append(str(error))
                continue
            end = points[-1].step
            raw.setdefault(end, self._place(points[-1:], "sma"))
            for scheme in self._grid.schemes:
                place = self._place(points, scheme)
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

    def _place(self, points: Sequence[TrajectoryPoint], scheme: str) -> int:
        plan = engine.plan(points, replace(self._options, scheme=scheme), opened=self._opened)
        place = self._places.setdefault(merge_key(plan), len(self._plans))
        if place == len(self._plans):
            self._plans.append(plan)
        return place


def merge_key(plan: Plan) -> str:
    """Tells merges apart by content: which files, weighed how, treated how. Not by where they lie."""
    options = plan.options
    return content_key(
        {
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
    documents: Sequence[Document],
    store: Store,
    *,
    cloze: int = 400,
    context_tokens: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
    begin: Callable[[Sequence[Plan]], None] = lambda plans: None,
) -> tuple[dict[int, Evaluation], int]:
    """Evaluations by plan, of every cell and of the raw checkpoints; and how many of them were in the store
    already. `begin` hears once of the plans that are not.
    """
    from pma.evaluation.evaluate import evaluate as evaluate_one
    from pma.evaluation.model import load_scorer

    key = evaluation_key(documents, cloze=cloze, context_tokens=context_tokens)
    store.prepare()
    known = {place: store.get(merge, key) for place, merge in enumerate(sweep.keys)}
    done = {place: _read_back(value, store) for place, value in known.items() if value is not None}
    missing = [place for place, value in known.items() if value is None]

    def use(number: int, tensors: dict[str, Tensor]) -> None:
        place = missing[number]
        plan = sweep.plans[place]
        announce(f"evaluating {number + 1} of {len(missing)}")
        scorer = load_scorer(tensors, plan.sources[-1].point.path, context_tokens=context_tokens)
        done[place] = evaluate_one(sweep.keys[place][:12], scorer, documents, cloze=cloze)
        store.put(sweep.keys[place], key, merge=_described(plan), result=done[place].to_json())

    begin([sweep.plans[place] for place in missing])
    if missing:
        engine.sweep_in_memory([sweep.plans[place] for place in missing], use)
    return done, len(known) - len(missing)


def _read_back(value: dict[str, Any], store: Store) -> Evaluation:
    """An evaluation from the store, which is a file like any other."""
    from pma.evaluation.evaluate import Evaluation

    try:
        return Evaluation.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{store.path} holds an evaluation that cannot be read ({printable(repr(error))}); "
            "remove the file, and it is computed again"
        ) from error


def evaluation_key(documents: Sequence[Document], *, cloze: int, context_tokens: int | None) -> str:
    """Tells evaluations apart by content: the text, the settings, and who computed them."""
    texts = [blake3(document.text.encode()).hexdigest() for document in documents]
    return content_key({"texts": texts, "cloze": cloze, "context_tokens": context_tokens, "pma": __version__})


def _described(plan: Plan) -> dict[str, Any]:
    sources = [
        {"path": str(source.point.path), "step": source.point.step, "weight": source.weight}
        for source in plan.sources
    ]
    return {"scheme": plan.options.scheme, "sources": sources}


def rows(sweep: Sweep, evaluations: dict[int, Evaluation]) -> list[dict[str, Any]]:
    """One row for each cell, best first: what it is, its loss, and its gain over the raw checkpoint it ends
    with.
    """
    from pma.evaluation.evaluate import loss_difference

    made = []
    for cell in sweep.cells:
        evaluation, raw = evaluations[cell.plan], evaluations[sweep.raw[cell.at]]
        gain = loss_difference(raw, evaluation)
        made.append(
            {
                "scheme": cell.scheme,
                "last": cell.last,
                "every": "-" if cell.every is None else str(cell.every),
                "every_order": 0 if cell.every is None else cell.every.count,
                "at": cell.at,
                "steps": [source.point.step for source in sweep.plans[cell.plan].sources],
                "loss": evaluation.loss.value,
                "standard_error": evaluation.loss.standard_error,
                "gain": gain.value,
                "gain_standard_error": gain.standard_error,
                "bits_per_byte": evaluation.bits_per_byte,
                "cloze": evaluation.cloze_accuracy,
                "merge_key": sweep.keys[cell.plan],
            }
        )
    return sorted(made, key=lambda row: row["loss"])
