"""The checkpoints of a run in order, from metadata alone; several roots; restarts followed along the
surviving lineage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pma import formats
from pma.errors import InputError, UsageError, printable
from pma.formats import hf_trainer, interval_mean
from pma.remote import RemotePath, each_at_once
from pma.trajectory.phases import Phase, phase_at
from pma.types import CheckpointMeta, TrainingLog

#: in a run: checkpoints that PMA keeps by hard links, for when the trainer has removed its own
KEPT_FOLDER = Path(".pma") / "kept"
NamedStep = Callable[[str], int | None]


@dataclass(frozen=True, kw_only=True)
class TrajectoryPoint:
    """One checkpoint of a trajectory. `step` and `tokens` are None where no record says them."""

    path: Path
    meta: CheckpointMeta
    phase: Phase

    @property
    def folder(self) -> Path:
        """Where its files are: itself, or for a lone file the folder that holds it."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def step(self) -> int | None:
        return self.meta.step

    @property
    def tokens(self) -> int | None:
        return self.meta.tokens

    @property
    def learning_rate(self) -> float | None:
        return self.meta.learning_rate

    def describe(self) -> dict[str, Any]:
        """As plain values for a table or JSON."""
        return {
            "path": str(self.path),
            "step": self.step,
            "tokens": self.tokens,
            "tokens_source": self.meta.tokens_source,
            "learning_rate": self.learning_rate,
            "phase": self.phase.value,
        }


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The checkpoints of one run, ordered by step; `left_out` says which were found and not taken, and
    why.
    """

    points: tuple[TrajectoryPoint, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    as_given: bool = False

    @property
    def log(self) -> TrainingLog:
        """Losses and learning rates as the newest checkpoint's lineage logged them."""
        return self.points[-1].meta.log if self.points else TrainingLog()


def discover(roots: Sequence[Path], pattern: str | None = None) -> Trajectory:
    """List the checkpoints below `roots` (scratch and archive, say) as one trajectory.

    `pattern`: a regular expression that the names of checkpoints match whole, for trainers whose names we do
    not know; a group `step` says their step where no record does.

    What PMA keeps of a run (`KEPT_FOLDER`) stands in for checkpoints that the trainer has removed.

    Raises InputError where a root is missing, is a file, or holds no checkpoint.
    """
    found: list[tuple[Path, CheckpointMeta]] = []
    left_out: list[tuple[Path, str]] = []
    for root in roots:
        inside = list(checkpoints_in(root, compiled_pattern(pattern)))
        metas = each_at_once(records_of, [path for path, _ in inside])
        for (path, named), read in zip(inside, metas, strict=True):
            meta, reason = judged(read, named, by_pattern=pattern is not None)
            if reason is None:
                found.append((path, meta))
            else:
                left_out.append((path, reason))
        found += _kept_by_pma(root, {path.name for path, _ in found}, pattern)
    kept, dropped = surviving_lineage(found)
    where = ", ".join(map(str, roots))
    if not kept:
        reasons = "".join(f"\n  {path.name}: {why}" for path, why in left_out[:5])
        raise InputError(f"{where} holds no complete checkpoint yet.{reasons}")
    return Trajectory(points=points_of(kept), left_out=tuple(left_out + dropped))


def judged(meta: CheckpointMeta, named: int | None, *, by_pattern: bool) -> tuple[CheckpointMeta, str | None]:
    """A checkpoint's records, with the step of its name where a pattern says it; and why it cannot be taken,
    or None. `named`: the step in its name.
    """
    if by_pattern and meta.step is None:
        meta = replace(meta, step=named)
    if meta.incomplete:
        return meta, f"incomplete: {meta.incomplete}"
    if meta.step is None:
        return meta, "its records do not say its step; --pattern can tell it by name"
    if named is not None and named != meta.step:
        return meta, f"its name and its records differ: it says it is step {meta.step}"
    return meta, None


def _kept_by_pma(root: Path, there: set[str], pattern: str | None) -> Iterator[tuple[Path, CheckpointMeta]]:
    for path, named in kept_checkpoints(root / KEPT_FOLDER, compiled_pattern(pattern)):
        if path.name not in there:
            meta, reason = judged(records_of(path), named, by_pattern=pattern is not None)
            if reason is None:
                yield path, meta


def kept_checkpoints(
    folder: Path, pattern: re.Pattern[str] | None, named_step: NamedStep = formats.named_step
) -> list[tuple[Path, int | None]]:
    """The checkpoints that PMA keeps in `folder`, and the step that the name of each says."""
    if isinstance(folder, RemotePath) or not folder.is_dir():
        return []  # no hard links in a store
    if pattern is None:
        return [(path, named_step(path.name)) for path in _named_checkpoints(folder, named_step)]
    matches = [(path, pattern.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [(path, _step_in(match)) for path, match in matches if match is not None]


def resolve(paths: Sequence[Path], *, as_given: bool = False, pattern: str | None = None) -> Trajectory:
    """What the command line names: either runs (folders of checkpoints) or checkpoints, one by one."""
    named = [path for path in paths if is_checkpoint(path)] if pattern is None else []
    if not named:
        if as_given:
            raise UsageError(
                "--as-given orders checkpoints as they are named; name them one by one instead of a run"
            )
        return discover(paths, pattern)
    if len(named) < len(paths):
        other = next(path for path in paths if path not in named)
        if not other.exists() or not any(other.iterdir() if other.is_dir() else ()):
            raise InputError(f"{other} is not a checkpoint: it is missing or empty")
        raise UsageError(
            f"{named[0]} is a checkpoint and {other} is not; give runs, or checkpoints, not both"
        )
    return from_checkpoints(paths, as_given=as_given)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` names one checkpoint and not a run.

    A run may hold weights beside its checkpoints: trainers save the final model there.
    """
    if formats.named_step(path.name) is not None:
        return path.exists()
    if (path / hf_trainer.RECORD_FILE).is_file():  # a merge, whose file may be named like one of a run
        return formats.is_checkpoint(path)
    return formats.is_checkpoint(path) and not (path.is_dir() and any(_named_checkpoints(path)))


def _named_checkpoints(root: Path, named_step: NamedStep = formats.named_step) -> list[Path]:
    """Entries of a run that are named as some trainer names its checkpoints."""
    named = [path for path in root.iterdir() if named_step(path.name) is not None]
    return sorted(path for path in named if path.is_dir() or formats.is_checkpoint(path))


def from_checkpoints(paths: Sequence[Path], *, as_given: bool = False) -> Trajectory:
    """A trajectory of checkpoints named one by one: ordered by step, or `as_given`.

    Raises UsageError where a path or step occurs twice, and InputError where one is not complete.
    """
    found = []
    for path, meta in zip(paths, each_at_once(records_of, paths), strict=True):
        if meta.incomplete:
            raise InputError(
                f"{path} is not complete or not usable: {meta.incomplete}. Wait for it if it is still being "
                "written, else leave it out"
            )
        found.append((path, meta))
    real = [path.resolve() for path, _ in found]
    for index, path in enumerate(real):
        if path in real[:index]:
            raise UsageError(f"{path} is given twice; name every checkpoint once")
    if not as_given:
        found = _ordered_by_step(found)
    return Trajectory(points=points_of(found), as_given=as_given)


def _ordered_by_step(found: list[tuple[Path, CheckpointMeta]]) -> list[tuple[Path, CheckpointMeta]]:
    steps = [meta.step for _, meta in found]
    if any(step is None for step in steps):
        return found  # weights that depend on the order are refused later, where the scheme is known
    for index, step in enumerate(steps):
        if step in steps[:index]:
            raise UsageError(
                f"{found[steps.index(step)][0]} and {found[index][0]} are both step {step}; "
                "checkpoints of one run have different steps. To average them all the same, say --as-given"
            )
    return sorted(found, key=lambda item: item[1].step or 0)


def points_of(found: Sequence[tuple[Path, CheckpointMeta]]) -> tuple[TrajectoryPoint, ...]:
    """As points of a trajectory, oldest first.

    Phases come from each checkpoint's own log, completed by the newest's, which may have seen what came
    next.
    """
    newest = found[-1][1].log.learning_rates
    points = []
    for path, meta in found:
        own = meta.log.learning_rates
        rates = newest if not own or own[-1] in newest else own
        phase = phase_at(meta.step, rates) if meta.step is not None else Phase.UNKNOWN
        points.append(TrajectoryPoint(path=path, meta=meta, phase=phase))
    return tuple(points)


def compiled_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """`pattern`, compiled. Raises UsageError where it is no regular expression."""
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--pattern {pattern!r} is not a regular expression: {error}") from None


def checkpoints_in(
    root: Path, pattern: re.Pattern[str] | None, named_step: NamedStep = formats.named_step
) -> Iterator[tuple[Path, int | None]]:
    """The checkpoints of a run, and the step that the name of each says."""
    if not root.exists():
        raise InputError(f"{root} does not exist; expected a run: a folder with checkpoint-N folders in it")
    if not root.is_dir():
        raise InputError(f"{root} is a file; expected a run: a folder with checkpoint-N folders in it")
    if pattern is not None:
        names = [path for path in sorted(root.iterdir()) if not interval_mean.is_mean(path.name)]
        matches = [(path, pattern.fullmatch(path.name)) for path in names]
        found = [(path, _step_in(match)) for path, match in matches if match is not None]
    else:
        # a folder named like a checkpoint is one even before it holds anything: it is being written
        found = [(path, named_step(path.name)) for path in _named_checkpoints(root, named_step)]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found and pattern is None:
        # merges of ours that lie in one folder are no run
        ours = [path for path in folders if (path / hf_trainer.RECORD_FILE).is_file()]
        found = [(path, None) for path in folders if path not in ours and formats.is_checkpoint(path)]
    if not found:
        # files may be checkpoints whose names are not known
        entries = (path for path in sorted(root.iterdir()) if path in folders or formats.is_checkpoint(path))
        inside = ", ".join(printable(p.name) for p in islice(entries, 5)) or "nothing that could be one"
        looked_for = (
            f"names that {printable(pattern.pattern)} matches from end to end (such as ckpt_100.pt)"
            if pattern
            else "checkpoint-N, step-N and so on"
        )
        raise InputError(
            f"{root} holds no checkpoint: looked for {looked_for}, found {inside}. Give the folder that your "
            "trainer saves into, name checkpoints one by one, or say how they are named with --pattern"
        )
    yield from found


def _step_in(match: re.Match[str]) -> int | None:
    text = match.groupdict().get("step")
    return int(text) if text is not None and text.isdecimal() and len(text) < 19 else None


def records_of(path: Path) -> CheckpointMeta:
    """What a checkpoint's records say. Raises InputError where there is none."""
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a checkpoint")
    return formats.read_meta(path)


def surviving_lineage(
    found: list[tuple[Path, CheckpointMeta]],
) -> tuple[list[tuple[Path, CheckpointMeta]], list[tuple[Path, str]]]:
    """Drop what a restart left behind: checkpoints whose log the newest one's log contradicts.

    The Trainer keeps its whole history in each checkpoint, so a checkpoint belongs to the newest one's
    lineage if their logs agree. Where logs cannot tell, the later written of two checkpoints of one step
    survives.
    """
    if not found:
        return [], []
    ordered = sorted(found, key=lambda item: (item[1].step or 0, _written_ns(item[0])))
    newest_path, newest = _head(ordered)
    kept: dict[int | None, tuple[Path, CheckpointMeta]] = {}
    dropped: list[tuple[Path, str]] = []
    for path, meta in ordered:
        if path is not newest_path and contradicts(meta.log, newest.log):
            dropped.append(
                (
                    path,
                    f"step {meta.step} of a lineage that was restarted; {newest_path} goes back to another",
                )
            )
            continue
        if meta.step in kept:
            dropped.append((kept[meta.step][0], f"step {meta.step} occurs again, later written, as {path}"))
        kept[meta.step] = (path, meta)
    return list(kept.values()), dropped


def _head(ordered: Sequence[tuple[Path, CheckpointMeta]]) -> tuple[Path, CheckpointMeta]:
    """Where the run is now: its highest step, or, after a restart that is not yet that far, what was written
    last.

    Times are trusted within a folder, where the trainer made them. Raises InputError where the highest step
    and the last written contradict each other across folders: copying changes times, so it cannot be told
    which is alive.
    """
    highest = ordered[-1]
    others = [item for item in ordered if contradicts(item[1].log, highest[1].log)]
    latest = max(others, key=lambda item: _written_ns(item[0]), default=highest)
    if _written_ns(latest[0]) <= _written_ns(highest[0]):
        return highest
    if _run_of(latest[0]) == _run_of(highest[0]):
        return latest
    raise InputError(
        f"{highest[0]} has the highest step but {latest[0]} was written later, and their logs contradict "
        "each other: "
        "they are of two lineages of a restarted run. Leave the dead one's folder out, or name checkpoints "
        "one by one"
    )


def _run_of(path: Path) -> Path:
    """The folder that the trainer wrote `path` into; what PMA keeps has the times of what it links to."""
    inside = KEPT_FOLDER.parts
    return path.parents[len(inside)] if path.parts[-1 - len(inside) : -1] == inside else path.parent


def contradicts(log: TrainingLog, newest: TrainingLog) -> bool:
    """Whether two logs say different losses of one step: then they are of different lineages."""
    mine, theirs = dict(log.losses), dict(newest.losses)
    # compared as text, so that NaN equals NaN
    return any(str(mine[step]) != str(theirs[step]) for step in mine.keys() & theirs.keys())


def _written_ns(path: Path) -> int:
    state = path / hf_trainer.STATE_FILE
    return (state if state.is_file() else path).stat().st_mtime_ns
