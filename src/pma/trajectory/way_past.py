"""The checkpoints before a breakaway, and from where a run can be led past it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pma.errors import UsageError
from pma.logs.breakaways import Breakaway, Kind
from pma.trajectory.discover import Trajectory, TrajectoryPoint
from pma.trajectory.window import of_one_phase


@dataclass(frozen=True, kw_only=True)
class WayPast:
    """Where to go back to: checkpoints of steps below `before_step`, the newest of which are `checkpoints`.

    `reserve`: why that may not do, or None.
    """

    breakaway: Breakaway
    before_step: int
    checkpoints: tuple[TrajectoryPoint, ...]
    reserve: str | None = None


def ways_past(found: Trajectory, breakaways: Sequence[Breakaway], *, last: int = 3) -> tuple[WayPast, ...]:
    """For each breakaway the newest `last` checkpoints before it that no other breakaway touches."""
    return tuple(_way_past(found, breakaway, breakaways, last) for breakaway in breakaways)


def _way_past(found: Trajectory, breakaway: Breakaway, others: Sequence[Breakaway], last: int) -> WayPast:
    # weights after the update of step s are first seen in the loss of step s + 1; so a checkpoint of the last
    # good step itself may already be bad, and one before it is not
    before = breakaway.good_step
    points = _before(found, before, last)
    while touched := [b.good_step for b in others if b.good_step < before and _touches(b, points)]:
        before = min(touched)
        points = _before(found, before, last)
    return WayPast(
        breakaway=breakaway, before_step=before, checkpoints=points, reserve=_reserve(points, before, last)
    )


def _before(found: Trajectory, step: int, last: int) -> tuple[TrajectoryPoint, ...]:
    return tuple([p for p in found.points if p.step is not None and p.step < step][-last:])


def _touches(breakaway: Breakaway, points: Sequence[TrajectoryPoint]) -> bool:
    # a blip is gone before the weights have moved
    return breakaway.kind is not Kind.BLIP and any(
        breakaway.good_step <= (point.step or 0) <= breakaway.last_step for point in points
    )


def _reserve(points: Sequence[TrajectoryPoint], before: int, last: int) -> str | None:
    if not points:
        return f"there is no complete checkpoint before step {before}"
    if len(points) < last:
        return f"there are only {len(points)} complete checkpoints before step {before}, not {last}"
    try:
        of_one_phase(points, allow_mixed=False)
    except UsageError as error:
        return str(error)
    return None
