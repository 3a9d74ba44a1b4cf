"""Which checkpoints are meant: runs or checkpoints, a window, the paper's preset for a model of this size."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from pma import engine, formats, trajectory
from pma.errors import UsageError
from pma.quantities import Tokens, distance_flag
from pma.trajectory import Phase, Preset, Trajectory, TrajectoryPoint, Window

#: checkpoints of a window for which the paper has no size
PLAIN_LAST = 10


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


def plain_window(found: Trajectory, *, at: int | None = None) -> Window:
    """What anyone would take: the paper's window where the paper had models of this size and the run counts
    its tokens, else the last ten checkpoints.
    """
    size = _preset(found)
    untold = any(point.tokens is None for point in found.points)
    if size.extrapolated or size.capped or untold:
        return Window(last=PLAIN_LAST, at=at)
    return preset_window(found, at=at)


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
