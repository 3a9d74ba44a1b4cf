"""A grid of windows and schemes: its cells, and a plan for each that differs in content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from blake3 import blake3

from pma import engine, trajectory
from pma.engine import SNAPSHOTS, MergeOptions, Plan
from pma.errors import UsageError
from pma.formats.contracts import CheckpointReader
from pma.quantities import Steps, Tokens, parse_distance
from pma.results import content_key
from pma.trajectory import Trajectory, TrajectoryPoint, Window


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
        every = "" if self.every is None else f"-every{distance_text(self.every)}"
        return f"{self.scheme.replace(':', '-')}-last{self.last}{every}-at{self.at}"


def distance_text(distance: Steps | Tokens) -> str:
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
    with planned_over(of_a_run(paths), grid, options) as sweep:
        yield sweep


def of_a_run(paths: Sequence[Path]) -> Trajectory:
    """The checkpoints to sweep over. Raises UsageError where they are named one by one."""
    if trajectory.is_checkpoint(paths[0]):
        raise UsageError(f"{paths[0]} is a checkpoint; a sweep chooses windows from a run")
    return trajectory.resolve(paths)


@contextmanager
def planned_over(found: Trajectory, grid: Grid, options: MergeOptions) -> Iterator[Sweep]:
    """As `planned`, over checkpoints that were found before."""
    with planner(options) as plans:
        yield _sweep(found, grid, plans)


class Plans:
    """Merges of one run, each distinct one planned once."""

    def __init__(self, options: MergeOptions, opened: dict[Path, CheckpointReader]) -> None:
        self.options = options
        self._opened = opened
        self._plans: list[Plan] = []
        self._places: dict[str, int] = {}

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(self._plans)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._places)

    def place(
        self,
        points: Sequence[TrajectoryPoint],
        scheme: str,
        use: str | None = None,
        *,
        weights: tuple[float, ...] | None = None,
    ) -> int:
        """Where the merge of `points`, oldest first, lies among the plans. `use`: the options' own by
        default. `weights`: given ones, instead of the scheme's.
        """
        options = replace(self.options, scheme=scheme, use=use or self.options.use, weights=weights)
        plan = engine.plan(points, options, opened=self._opened)
        place = self._places.setdefault(merge_key(plan), len(self._plans))
        if place == len(self._plans):
            self._plans.append(plan)
        return place

    def raw(self, point: TrajectoryPoint) -> int:
        """Where a checkpoint by itself lies among the plans."""
        return self.place([point], "sma", SNAPSHOTS)


@contextmanager
def planner(options: MergeOptions) -> Iterator[Plans]:
    """Every checkpoint is opened once, and closed after the block."""
    opened: dict[Path, CheckpointReader] = {}
    try:
        yield Plans(options, opened)
    finally:
        for reader in opened.values():
            reader.close()


def _sweep(found: Trajectory, grid: Grid, plans: Plans) -> Sweep:
    cells, raw, skipped = cells_of(found, grid, plans)
    if not cells:
        raise UsageError("no window of the sweep exists: " + skipped[0])
    return Sweep(
        cells=cells,
        plans=plans.plans,
        keys=plans.keys,
        raw=raw,
        skipped=skipped,
        left_out=tuple(found.left_out),
    )


def cells_of(
    found: Trajectory, grid: Grid, plans: Plans
) -> tuple[tuple[Cell, ...], dict[int | None, int], tuple[str, ...]]:
    """The cells of the windows that exist, the place of the raw checkpoint at each end, and why the other
    windows do not exist.
    """
    cells, skipped = [], []
    raw: dict[int | None, int] = {}
    for at, every, last in product(grid.ats, grid.everys, grid.lasts):
        window = Window(last=last, every=every, at=at, allow_mixed_phases=grid.allow_mixed_phases)
        try:
            points = trajectory.select(found, window)
            if plans.options.uses_means:
                engine.located_means(points)
        except UsageError as error:
            skipped.append(str(error))
            continue
        end = points[-1].step
        raw.setdefault(end, plans.raw(points[-1]))
        for scheme in grid.schemes:
            place = plans.place(points, scheme)
            cells.append(Cell(scheme=scheme, last=last, every=every, at=end, plan=place))
    return tuple(cells), raw, tuple(skipped)


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
