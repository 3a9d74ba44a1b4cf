"""Which checkpoints of a trajectory to average: how many, how far apart, ending where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pma.errors import UsageError
from pma.quantities import Steps, Tokens, count_text
from pma.trajectory.discover import Trajectory, TrajectoryPoint
from pma.trajectory.phases import Phase


@dataclass(frozen=True, kw_only=True)
class Window:
    """The newest `last` checkpoints, `every` so many tokens or steps, up to step `at`, or to the newest
    before step `before` (the newest by default).
    """

    last: int
    every: Steps | Tokens | None = None
    at: int | None = None
    before: int | None = None
    allow_mixed_phases: bool = False

    def __post_init__(self) -> None:
        if self.last < 1:
            raise UsageError(f"--last {self.last}: a window has at least one checkpoint")
        if self.at is not None and self.before is not None:
            raise UsageError("--at ends the window at a step, --before-step before one; say one of them")


def select(trajectory: Trajectory, window: Window) -> tuple[TrajectoryPoint, ...]:
    """The window's checkpoints, oldest first.

    Raises UsageError, listing the checkpoints there are, where the window does not exist or crosses phases.
    """
    candidates = _up_to(trajectory.points, window.at)
    if window.before is not None:
        candidates = _before(candidates, window.before)
    if window.every is None:
        if len(candidates) < window.last:
            raise UsageError(
                f"--last {window.last}: there are only {len(candidates)} complete checkpoints"
                f"{_end(window)}: {_listed(candidates)}"
            )
        chosen = candidates[-window.last :]
    else:
        chosen = _spaced(candidates, window.last, window.every)
    return of_one_phase(chosen, allow_mixed=window.allow_mixed_phases)


def _up_to(points: Sequence[TrajectoryPoint], at: int | None) -> Sequence[TrajectoryPoint]:
    if at is None:
        return points
    ends = [index for index, point in enumerate(points) if point.step == at]
    if not ends:
        raise UsageError(f"--at {at}: no checkpoint of that step; there are {_listed(points)}")
    return points[: ends[0] + 1]


def _before(points: Sequence[TrajectoryPoint], step: int) -> Sequence[TrajectoryPoint]:
    earlier = [point for point in points if point.step is not None and point.step < step]
    if not earlier:
        raise UsageError(
            f"--before-step {step}: no complete checkpoint before that step; there are {_listed(points)}"
        )
    return earlier


def _end(window: Window) -> str:
    if window.before is not None:
        return f" before step {window.before}"
    return f" up to step {window.at}" if window.at is not None else ""


def _spaced(points: Sequence[TrajectoryPoint], last: int, every: Steps | Tokens) -> list[TrajectoryPoint]:
    positions = [_position(point, every) for point in points]
    chosen: list[TrajectoryPoint] = []
    for back in range(last - 1, -1, -1):
        mark = positions[-1] - back * every.count
        nearest = min(range(len(points)), key=lambda index: abs(positions[index] - mark))
        if mark < positions[0] - every.count:
            unit = "tokens" if isinstance(every, Tokens) else "steps"
            raise UsageError(
                f"--last {last} --every {every}: such a window spans {count_text((last - 1) * every.count)} "
                f"{unit}, "
                f"but the checkpoints there are span {count_text(positions[-1] - positions[0])}; there are "
                f"{_listed(points)}"
            )
        if abs(positions[nearest] - mark) * 4 > every.count:
            what = f"{count_text(mark)} tokens" if isinstance(every, Tokens) else f"step {mark}"
            raise UsageError(
                f"--last {last} --every {every}: no checkpoint within a quarter of {every} of {what}; "
                f"there are {_listed(points)}"
            )
        chosen.append(points[nearest])
    return chosen


def _position(point: TrajectoryPoint, every: Steps | Tokens) -> int:
    value = point.tokens if isinstance(every, Tokens) else point.step
    if value is None:
        what = "tokens" if isinstance(every, Tokens) else "step"
        hint = " (the Trainer counts them with include_num_input_tokens_seen); give --every in steps"
        raise UsageError(
            f"--every {every}: {point.path} does not record its {what}{hint if what == 'tokens' else ''}"
        )
    return value


def of_one_phase(points: Sequence[TrajectoryPoint], *, allow_mixed: bool) -> tuple[TrajectoryPoint, ...]:
    """`points`, unless they cross warmup, a change of the constant rate or the start of a decay: then
    UsageError.
    """
    known = [point for point in points if point.phase is not Phase.UNKNOWN]
    kinds = {(p.phase, p.learning_rate if p.phase is Phase.STABLE else None) for p in known}
    if len(kinds) > 1 and not allow_mixed:
        parts = ", ".join(
            f"step {p.step} {p.phase.value}"
            + (f" at lr {p.learning_rate:g}" if p.learning_rate is not None else "")
            for p in _phase_starts(known)
        )
        raise UsageError(
            f"the window crosses phases: {parts}. Averages across phases are seldom good; "
            "end the window earlier with --at STEP, make it shorter, or say --allow-mixed-phases"
        )
    return tuple(points)


def _phase_starts(points: Sequence[TrajectoryPoint]) -> list[TrajectoryPoint]:
    starts = [points[0]]
    for point in points[1:]:
        before = starts[-1]
        if point.phase is not before.phase or (
            point.phase is Phase.STABLE and point.learning_rate != before.learning_rate
        ):
            starts.append(point)
    return starts


def _listed(points: Sequence[TrajectoryPoint], most: int = 12) -> str:
    """Steps (and tokens, where known) of the checkpoints there are, the middle left out of a long list."""
    shown = [
        f"{p.step if p.step is not None else p.path.name}"
        + (f" ({count_text(p.tokens)} tokens)" if p.tokens else "")
        for p in points
    ]
    if len(shown) > most:
        shown = [*shown[:3], f"… {len(shown) - most} more …", *shown[3 - most :]]
    return "steps " + ", ".join(shown) if shown else "none"
