"""What a search tries: the last checkpoint as it is, windows, and the best single checkpoints of the recent
past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pma import averaging, trajectory
from pma.choosing import PLAIN_LAST, plain_window
from pma.engine import SNAPSHOTS
from pma.errors import UsageError
from pma.quantities import Steps, Tokens
from pma.sweeping.grid import Cell, Grid, Plans, cells_of
from pma.trajectory import Trajectory, TrajectoryPoint, Window

LASTS = (3, 6, 10, 20)
#: every checkpoint, every second, every fourth
SPACINGS = (1, 2, 4)
SCHEMES = ("sma", "wma", "ema:0.2")
BEST = (3, 10)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched; what is None is the search's own choice.

    `best`: how many of the best single checkpoints of the recent past, twice as many as the most of these.
    """

    lasts: tuple[int, ...] | None = None
    everys: tuple[Steps | Tokens | None, ...] | None = None
    ats: tuple[int | None, ...] = (None,)
    schemes: tuple[str, ...] | None = None
    best: tuple[int, ...] | None = None
    allow_mixed_phases: bool = False

    def __post_init__(self) -> None:
        for count in self.best or ():
            if count < 2:
                raise UsageError(f"--best {count}: a merge has at least two checkpoints")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A merge of `points`, oldest first, that stands for a candidate; `plan`: its place among the plans.

    `best_of`: the points are the best of the newest so many. `weights`: where the scheme's weights are not
    in the order of their steps but of their losses, the best in place of the newest.
    """

    points: tuple[TrajectoryPoint, ...]
    scheme: str
    plan: int
    every: Steps | Tokens | None = None
    best_of: int | None = None
    weights: tuple[float, ...] | None = None
    use: str = SNAPSHOTS

    @property
    def last(self) -> int:
        """How many checkpoints it averages."""
        return len(self.points)

    @property
    def at(self) -> int | None:
        """The step of its newest checkpoint."""
        return self.points[-1].step

    @property
    def words(self) -> str:
        """What it is, for people."""
        if self.last == 1:
            return f"checkpoint of step {self.at}, as it is"
        if self.best_of is not None:
            order = ", the best in place of the newest" if self.weights else ""
            return f"{self.scheme} of the best {self.last} of the newest {self.best_of}{order}"
        every = "" if self.every is None else f", {self.every} apart"
        return f"{self.scheme} of the last {self.last}{every}, up to step {self.at}"


@dataclass(frozen=True, kw_only=True)
class Field:
    """The candidates that are known before anything is read, each content once, plainest first: the last
    checkpoint, the plain window, all others. `pool`: the checkpoints, oldest first, of which the best are
    averaged, so many as `best` says. `skipped`: what the run does not have, and why.
    """

    last: Contender
    plain: Contender
    windows: tuple[Contender, ...]
    pool: tuple[TrajectoryPoint, ...]
    best: tuple[int, ...]
    schemes: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def known(self) -> tuple[Contender, ...]:
        """All candidates but those of the best checkpoints."""
        return distinct((self.last, self.plain, *self.windows))

    @property
    def most(self) -> int:
        """How many candidates there will be at most."""
        return len(self.known) + len(self.best) * sum(map(len, map(_orders, self.schemes)))


def field(found: Trajectory, space: Space, plans: Plans) -> Field:
    """The candidates of a run. Raises UsageError where it has too few checkpoints for any."""
    points = _up_to_newest_end(found, space)
    recent = _of_one_phase(points, allow_mixed=space.allow_mixed_phases)
    without_steps = any(point.step is None for point in points)
    grid = Grid(
        lasts=space.lasts or _lasts(recent),
        everys=space.everys or _everys(recent),
        ats=space.ats,
        schemes=space.schemes or (SCHEMES[:1] if without_steps else SCHEMES),
        allow_mixed_phases=space.allow_mixed_phases,
    )
    pool, best, too_many = _pool(recent, space, plans)
    cells, _, skipped = cells_of(found, grid, plans)
    if not cells:
        raise UsageError("no window of the search exists: " + skipped[0])
    last = Contender(points=points[-1:], scheme="sma", plan=plans.raw(points[-1]))
    return Field(
        last=last,
        plain=_plain(found, points[-1], recent, plans),
        windows=tuple(_of_cell(cell, plans) for cell in sorted(cells, key=lambda cell: _rank(cell, grid))),
        pool=pool,
        best=best,
        schemes=grid.schemes,
        # of its own choice only what there is
        skipped=(*(skipped if space.lasts else ()), *too_many),
    )


def merges_of_best(field: Field, loss_of: Mapping[Path, float], plans: Plans) -> tuple[Contender, ...]:
    """The merges of the best checkpoints of the pool by `loss_of` their paths."""
    ranked = sorted(field.pool, key=lambda point: loss_of[point.path])
    made = []
    for count in field.best:
        chosen = ranked[:count]
        points = tuple(point for point in field.pool if point in chosen)
        for scheme in field.schemes:
            for by_loss in _orders(scheme):
                weights = _by_rank(scheme, [chosen.index(point) for point in points]) if by_loss else None
                place = plans.place(points, scheme, weights=weights)
                made.append(
                    Contender(
                        points=points, scheme=scheme, plan=place, best_of=len(field.pool), weights=weights
                    )
                )
    return tuple(made)


def _by_rank(scheme: str, rank_N: Sequence[int]) -> tuple[float, ...]:
    """The scheme's weights of evenly spaced checkpoints, its newest one's for rank 0."""
    weights_N = averaging.scheme(scheme)([float(position) for position in range(len(rank_N))])
    return tuple(float(weights_N[-1 - rank]) for rank in rank_N)


def distinct(contenders: Sequence[Contender]) -> tuple[Contender, ...]:
    """The first of each content."""
    first: dict[int, Contender] = {}
    for contender in contenders:
        first.setdefault(contender.plan, contender)
    return tuple(first.values())


def _orders(scheme: str) -> tuple[bool, ...]:
    """Whether by loss: where all weights are equal the order makes no difference."""
    return (False,) if averaging.equal(averaging.scheme(scheme)([0.0, 1.0, 2.0])) else (False, True)


def _up_to_newest_end(found: Trajectory, space: Space) -> tuple[TrajectoryPoint, ...]:
    ends = [trajectory.select(found, Window(last=1, at=at))[0] for at in space.ats]
    return found.points[: max(map(found.points.index, ends)) + 1]


def _of_one_phase(points: Sequence[TrajectoryPoint], *, allow_mixed: bool) -> tuple[TrajectoryPoint, ...]:
    """The newest that can be averaged together."""
    for start in range(len(points)):
        try:
            return trajectory.of_one_phase(points[start:], allow_mixed=allow_mixed)
        except UsageError:
            continue
    return tuple(points)


def _lasts(recent: Sequence[TrajectoryPoint]) -> tuple[int, ...]:
    lasts = tuple(last for last in LASTS if last <= len(recent))
    if not lasts:
        raise UsageError(
            f"a search needs at least {LASTS[0]} complete checkpoints of one phase; up to "
            f"{recent[-1].path.name} there are {len(recent)}. Search later, or say which windows "
            "with --last N,N"
        )
    return lasts


def _everys(recent: Sequence[TrajectoryPoint]) -> tuple[Steps | Tokens | None, ...]:
    """Every checkpoint, and where their distances are known also every few of them."""
    steps = [point.step for point in recent if point.step is not None]
    gaps = sorted(b - a for a, b in pairwise(steps))
    if len(steps) < len(recent) or not gaps:
        return (None,)
    spacing = gaps[len(gaps) // 2]
    return (None, *(Steps(count * spacing) for count in SPACINGS[1:]))


def _plain(
    found: Trajectory, newest: TrajectoryPoint, recent: Sequence[TrajectoryPoint], plans: Plans
) -> Contender:
    window = plain_window(found, at=newest.step)
    try:
        points = trajectory.select(found, window)
    except UsageError:
        window = Window(last=min(PLAIN_LAST, len(recent)))
        points = tuple(recent[-window.last :])
    place = plans.place(points, "sma", SNAPSHOTS)
    return Contender(points=points, scheme="sma", plan=place, every=window.every)


def _pool(
    recent: Sequence[TrajectoryPoint], space: Space, plans: Plans
) -> tuple[tuple[TrajectoryPoint, ...], tuple[int, ...], tuple[str, ...]]:
    if plans.options.uses_means:
        if space.best:
            raise UsageError("--best chooses among checkpoints; it does not go with --use interval-means")
        return (), (), ()
    wanted = BEST if space.best is None else space.best
    pool = tuple(recent[-2 * max(wanted, default=0) :]) if wanted else ()
    # all of the pool would be a window
    best = tuple(count for count in wanted if count < len(pool))
    too_many = [
        f"--best {count}: only {len(pool)} checkpoints to choose from"
        for count in wanted
        if count not in best
    ]
    return pool if best else (), best, tuple(too_many if space.best else ())


def _of_cell(cell: Cell, plans: Plans) -> Contender:
    points = tuple(source.point for source in plans.plans[cell.plan].sources)
    use = plans.options.use
    return Contender(points=points, scheme=cell.scheme, plan=cell.plan, every=cell.every, use=use)


def _rank(cell: Cell, grid: Grid) -> tuple[int, ...]:
    """Plainer ones first: schemes and distances in the order given, fewer checkpoints, a newer end."""
    return grid.schemes.index(cell.scheme), grid.everys.index(cell.every), cell.last, -(cell.at or 0)
