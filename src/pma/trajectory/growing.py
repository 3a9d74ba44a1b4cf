"""A run's trajectory kept up to date while a trainer writes: a look lists names, and reads what is new.

Metadata of a complete checkpoint are not read again: two stats tell whether it was rewritten. Only the newest
checkpoint's log is kept; where a new one does not simply go on from it, everything is read anew.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pma import formats
from pma.errors import InputError
from pma.formats import hf_trainer
from pma.remote import RemotePath, each_at_once
from pma.trajectory.discover import (
    KEPT_FOLDER,
    Trajectory,
    TrajectoryPoint,
    checkpoints_in,
    compiled_pattern,
    contradicts,
    judged,
    kept_checkpoints,
    points_of,
    records_of,
    surviving_lineage,
)
from pma.trajectory.phases import phase_at
from pma.types import CheckpointMeta, TrainingLog

# names recur at every look, and for some of them formats of others are searched for
_NAMES_REMEMBERED = 4096
Stamp = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look found. `landed`: complete since the look before, oldest first, and of the run's lineage.

    `waiting`: what is there and not taken, and why. `went_back`: the trainer did not simply go on from where
    it was, so that what was seen before may be of a dead lineage.
    """

    trajectory: Trajectory
    landed: tuple[TrajectoryPoint, ...] = ()
    waiting: tuple[tuple[Path, str], ...] = ()
    went_back: bool = False


@dataclass(kw_only=True)
class _Complete:
    """A checkpoint that is complete. `witness`: its file that was written last."""

    witness: Path
    stamp: Stamp
    mark: str
    named: int | None


class Growing:
    """The checkpoints of `run`, also those that PMA keeps in `kept`. Raises InputError where `run` is no
    folder. `pattern` as for `discover`.
    """

    def __init__(self, run: Path, pattern: str | None = None, kept: Path | None = None) -> None:
        if not run.is_dir():
            raise InputError(f"{run} is no folder; expected a run: the folder a trainer saves into")
        self.run, self.pattern = run, pattern
        self.kept = kept or run / KEPT_FOLDER
        self._compiled = compiled_pattern(pattern)
        self._named_step = lru_cache(_NAMES_REMEMBERED)(formats.named_step)
        self._complete: dict[Path, _Complete] = {}
        self._waiting: dict[Path, tuple[Stamp | None, str]] = {}
        self._trajectory = Trajectory(points=())
        self._dropped: tuple[tuple[Path, str], ...] = ()

    def look(self) -> Look:
        """What there is now."""
        candidates = dict(self._listed())
        had = set(self._complete)
        for path in [*self._complete, *self._waiting]:
            if path not in candidates:
                self._complete.pop(path, None)
                self._waiting.pop(path, None)
        landed = self._read_changed(candidates)
        went_back = False
        if landed or had - self._complete.keys():
            extended = self._extended(landed)
            went_back = extended is None and bool(self._trajectory.points)
            self._trajectory = extended or self._assembled(landed)
        points = self._trajectory.points
        return Look(
            trajectory=self._trajectory,
            landed=tuple(point for point in points if point.path in landed),
            waiting=tuple((path, reason) for path, (_, reason) in self._waiting.items()) + self._dropped,
            went_back=went_back,
        )

    def mark(self, path: Path) -> str:
        """Tells this writing of a complete checkpoint from a later one under the same name; the same for a
        hard link to it.
        """
        known = self._complete.get(path)
        return known.mark if known is not None else ""

    def reject(self, path: Path, reason: str, stamp: Stamp | None) -> None:
        """Take `path` for incomplete, although its records say otherwise, until its files are not any more as
        they were at `stamp`.
        """
        if self._complete.pop(path, None) is not None:
            self._waiting[path] = (stamp, reason)
            self._trajectory = self._without_missing()

    def stamp(self, path: Path) -> Stamp | None:
        """Changes when any file in `path` does; None where that cannot be told cheaply."""
        return _thorough_stamp(path)

    # ---- listing ----

    def _listed(self) -> Iterable[tuple[Path, int | None]]:
        try:
            yield from checkpoints_in(self.run, self._compiled, self._named_step)
        except InputError:
            if not self.run.is_dir():
                raise
            # no checkpoint yet: that is what is waited for
        yield from kept_checkpoints(self.kept, self._compiled, self._named_step)

    def _read_changed(self, candidates: Mapping[Path, int | None]) -> dict[Path, CheckpointMeta]:
        """Records of those that are complete and were not, or were written anew."""
        changed: list[tuple[Path, Stamp | None]] = []
        for path in candidates:
            known, waiting = self._complete.get(path), self._waiting.get(path)
            stamp = _stamp(path, known.witness) if known is not None else _thorough_stamp(path)
            before = known.stamp if known is not None else waiting[0] if waiting is not None else None
            if stamp is None or stamp != before:
                changed.append((path, stamp))
        landed: dict[Path, CheckpointMeta] = {}
        read = each_at_once(_records_or_why, [path for path, _ in changed])
        for (path, stamp), found in zip(changed, read, strict=True):
            reason: str | None
            if isinstance(found, str):
                reason = found
            else:
                found, reason = judged(found, candidates[path], by_pattern=self.pattern is not None)
            if reason is None and not isinstance(found, str):
                if self._is_new(path, candidates[path]):
                    landed[path] = found
            else:
                self._complete.pop(path, None)
                self._waiting[path] = (stamp, str(reason))
        return landed

    def _is_new(self, path: Path, named: int | None) -> bool:
        """Take note that `path` is complete; whether it is not just as it was, here or where it is kept."""
        try:
            witness = _witness(path)
            status = witness.stat()
            stamp = _stamp(path, witness) or ()
        except OSError:  # gone again
            self._complete.pop(path, None)
            return False
        mark = f"{witness.name} {status.st_size} {status.st_mtime_ns}"
        same = [k.mark for other, k in self._complete.items() if other.name == path.name]
        self._complete[path] = _Complete(witness=witness, stamp=stamp, mark=mark, named=named)
        self._waiting.pop(path, None)
        return mark not in same

    # ---- the trajectory ----

    def _usable(self) -> dict[str, Path]:
        """Complete checkpoints by name; what is kept only where the trainer's own is gone."""
        found = {path.name: path for path in self._complete if path.parent == self.kept}
        return found | {path.name: path for path in self._complete if path.parent != self.kept}

    def _without_missing(self) -> Trajectory:
        """The trajectory without what is gone, and with what is kept in place of it."""
        usable = self._usable()
        points = self._trajectory.points
        left = [replace(p, path=usable[p.path.name]) for p in points if p.path.name in usable]
        return replace(self._trajectory, points=tuple(left))

    def _extended(self, landed: Mapping[Path, CheckpointMeta]) -> Trajectory | None:
        """The trajectory with newer checkpoints that go on from its newest; None if it is not that simple."""
        if not self._trajectory.points:
            return None
        head = self._trajectory.points[-1]
        left = self._without_missing()
        if not left.points or left.points[-1].step != head.step:
            return None
        points = list(left.points)
        for path, meta in sorted(landed.items(), key=lambda item: item[1].step or 0):
            before = points[-1].meta
            if (meta.step or 0) <= (before.step or 0) or contradicts(meta.log, before.log):
                return None
            rates = meta.log.learning_rates
            seen = rates if _goes_on(before.log, meta.log) else None
            points = [_seen_from(point, seen) for point in points]
            points.append(TrajectoryPoint(path=path, meta=meta, phase=phase_at(meta.step or 0, rates)))
        return replace(self._trajectory, points=tuple(points))

    def _assembled(self, landed: Mapping[Path, CheckpointMeta]) -> Trajectory:
        """The trajectory from all records, as `discover` makes it."""
        found: list[tuple[Path, CheckpointMeta]] = []
        for path in self._usable().values():
            meta = landed.get(path) or _records_or_why(path)
            if isinstance(meta, str):
                continue  # gone meanwhile; the next look sees it
            found.append(
                (path, judged(meta, self._complete[path].named, by_pattern=self.pattern is not None)[0])
            )
        kept, dropped = surviving_lineage(found)
        self._dropped = tuple(dropped)
        points = points_of(kept) if kept else ()
        return Trajectory(points=(*map(_without_log, points[:-1]), *points[-1:]))


def _goes_on(before: TrainingLog, log: TrainingLog) -> bool:
    """Whether `log` holds what was logged `before`, as the Trainer's does."""
    rates = log.learning_rates
    if not before.learning_rates:
        return False
    last = before.learning_rates[-1]
    place = bisect_left(rates, last[0], key=lambda point: point[0])
    return place < len(rates) and rates[place] == last


def _seen_from(point: TrajectoryPoint, rates: Sequence[tuple[int, float]] | None) -> TrajectoryPoint:
    """`point` when a newer checkpoint is there: its phase may show only now, in the rates logged by then."""
    phase = phase_at(point.step or 0, rates) if rates is not None else point.phase
    return (
        point if phase is point.phase and not _has_log(point) else replace(_without_log(point), phase=phase)
    )


def _without_log(point: TrajectoryPoint) -> TrajectoryPoint:
    # each holds the whole history: all of them would grow with the square of the run's length
    return replace(point, meta=replace(point.meta, log=TrainingLog())) if _has_log(point) else point


def _has_log(point: TrajectoryPoint) -> bool:
    return bool(point.meta.log.losses or point.meta.log.learning_rates)


def _records_or_why(path: Path) -> CheckpointMeta | str:
    try:
        return records_of(path)
    except (InputError, OSError) as error:  # removed, or being removed, while it was looked at
        return str(error)


def _witness(path: Path) -> Path:
    """The file of a complete checkpoint that was written last."""
    if not path.is_dir():
        return path
    state = path / hf_trainer.STATE_FILE
    if state.is_file():
        return state
    return max(path.iterdir(), key=lambda inside: inside.stat().st_mtime_ns, default=path)


def _stamp(path: Path, witness: Path) -> Stamp | None:
    """Changes when files come or go or the last is written anew; None where it cannot be told."""
    if isinstance(path, RemotePath):
        return ()  # what is complete in a store stays as it is; each stat would be a request
    try:
        folder, last = os.stat(path), os.stat(witness)
    except OSError:
        return None
    return folder.st_ino, folder.st_mtime_ns, last.st_size, last.st_mtime_ns


def _thorough_stamp(path: Path) -> Stamp | None:
    """Changes when any file in `path` does; None for what is in a store, which is asked every time."""
    if isinstance(path, RemotePath):
        return None
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    try:
        seen = [os.stat(file) for file in sorted(files) or [str(path)]]
    except OSError:
        return None
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in seen)
