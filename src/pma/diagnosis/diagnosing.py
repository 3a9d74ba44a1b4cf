"""The diagnosis of a window of checkpoints: read once, then told from inner products, phases and the log."""

# N checkpoints

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from pma.diagnosis.advising import Read, advise
from pma.diagnosis.groups import GROUPS, group_of
from pma.diagnosis.movement import Movement, movement
from pma.diagnosis.verdict import Advice, Verdict
from pma.engine import Plan
from pma.engine.gram import GroupOf, InnerProducts, inner_products
from pma.engine.stream import Progress
from pma.errors import InputError
from pma.logs import Breakaway, TrainingCurves, breakaways
from pma.trajectory import Phase, TrajectoryPoint

#: checkpoints of a run that are read where no window is given
MOST_BY_DEFAULT = 20


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Of checkpoints `points`, oldest first, which lie at `positions_N`: steps, or where those are not known
    whole numbers (`unit` says which). `whole` model and by group of tensors; where the rate `changes`; what
    broke away; the `advice`; `notes` for people.
    """

    points: tuple[TrajectoryPoint, ...]
    positions_N: tuple[float, ...]
    unit: str
    whole: Movement
    groups: Mapping[str, Movement]
    changes: tuple[str, ...]
    breakaways: tuple[Breakaway, ...]
    advice: Advice
    notes: tuple[str, ...]
    bytes_read: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "checkpoints": [point.describe() for point in self.points],
            "unit": self.unit,
            "whole": self.whole.to_json(self.positions_N),
            "groups": {name: group.to_json(self.positions_N) for name, group in self.groups.items()},
            "changes": list(self.changes),
            "breakaways": [_described(each) for each in self.breakaways],
            "advice": self.advice.to_json(),
            "notes": list(self.notes),
            "bytes_read": self.bytes_read,
        }


class Reading(Protocol):
    """What reads checkpoints for their inner products: `gram.inner_products`, or it on many nodes."""

    def __call__(
        self, plan: Plan, group_of: GroupOf, *, progress: Progress | None = None
    ) -> InnerProducts: ...


def diagnose(
    plan: Plan,
    curves: TrainingCurves | None = None,
    *,
    progress: Progress | None = None,
    reading: Reading = inner_products,
) -> Diagnosis:
    """Read the plan's checkpoints once, by `reading`, and tell what they and the log say.

    Raises InputError for a single checkpoint, NonfiniteError for NaN or infinity in any.
    """
    points = tuple(source.point for source in plan.sources)
    if len(points) < 2:
        raise InputError(
            f"{points[0].path} is a single checkpoint, which tells nothing of how the weights move; a "
            "diagnosis needs at least two of a run, better ten or more (--last)"
        )
    products = reading(plan, group_of, progress=progress)
    notes = []
    steps = [point.step for point in points if point.step is not None]
    if len(steps) == len(points) and all(a < b for a, b in pairwise(steps)):
        positions_N, unit = tuple(float(step) for step in steps), "steps"
    else:
        positions_N, unit = tuple(float(n) for n in range(len(points))), "checkpoints"
        notes.append("steps are not known, so checkpoints count as evenly spaced in the order given")
    whole, groups = _movements(positions_N, products)
    if whole.distance == 0 and whole.path == 0:
        notes.append("all checkpoints hold the same weights")
    broke_away = _inside(points, curves)
    if curves is None or unit != "steps":
        what = "no training log was found (--log names one)" if curves is None else "steps are not known"
        advice = Advice(verdict=Verdict.CANNOT_TELL, reasons=(f"{what}, so what drift costs is not known",))
    else:
        advice = advise(
            Read(
                points=points,
                steps_M=positions_N,
                deviations_MM=products.deviations_GNN.sum(axis=0),
                length=whole.newest_norm,
                curves=curves,
                breakaways=broke_away,
            )
        )
    return Diagnosis(
        points=points,
        positions_N=positions_N,
        unit=unit,
        whole=whole,
        groups=groups,
        changes=tuple(_changes(points)),
        breakaways=broke_away,
        advice=advice,
        notes=tuple(notes),
        bytes_read=products.bytes_read,
    )


def _movements(positions_N: Sequence[float], products: InnerProducts) -> tuple[Movement, dict[str, Movement]]:
    elements = int(products.elements_G.sum())
    deviations_NN, newest_N = products.deviations_GNN.sum(axis=0), products.newest_GN.sum(axis=0)
    groups = {
        name: movement(
            positions_N,
            int(products.elements_G[g]),
            products.deviations_GNN[g],
            products.newest_GN[g],
        )
        for name in GROUPS
        if name in products.groups
        for g in [products.groups.index(name)]
    }
    return movement(positions_N, elements, deviations_NN, newest_N), groups


def _changes(points: Sequence[TrajectoryPoint]) -> list[str]:
    """Where the window crosses warmup, another constant rate, or the start of a decay."""
    changes = []
    for before, after in pairwise(points):
        constant = before.phase is after.phase is Phase.STABLE
        if before.phase is not after.phase or (constant and before.learning_rate != after.learning_rate):
            changes.append(f"between {_place(before)} and {_place(after)}")
    return changes


def _place(point: TrajectoryPoint) -> str:
    rate = f" at lr {point.learning_rate:g}" if point.learning_rate is not None else ""
    where = f"step {point.step}" if point.step is not None else point.path.name
    return f"{where} ({point.phase.value}{rate})"


def _inside(points: Sequence[TrajectoryPoint], curves: TrainingCurves | None) -> tuple[Breakaway, ...]:
    """What broke away between the first checkpoint and the last."""
    first, last = points[0].step, points[-1].step
    if curves is None or first is None or last is None:
        return ()
    return tuple(b for b in breakaways(curves) if b.last_step >= first and b.first_step <= last)


def _described(found: Breakaway) -> dict[str, Any]:
    value = {**asdict(found), "kind": found.kind.value}
    return {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in value.items()}
