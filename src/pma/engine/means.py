"""Interval means as sources of a merge: which checkpoints have one, what they cover together, how they
weigh.
"""

# N checkpoints, each with a stored mean

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from pma import averaging
from pma.conversion import ConvertedReader
from pma.errors import FormatError, MismatchError, UsageError
from pma.formats import interval_mean
from pma.formats.contracts import CheckpointReader
from pma.formats.interval_mean import IntervalMean
from pma.formats.mean_reader import MeanReader
from pma.remote import each_at_once
from pma.trajectory import TrajectoryPoint
from pma.types import TensorSpec

SNAPSHOTS, INTERVAL_MEANS = USES = ("snapshots", "interval-means")
_LISTED = 5


def stored_beside(points: Sequence[TrajectoryPoint]) -> int:
    """How many of the checkpoints have a mean beside them; none is opened."""
    return sum(each_at_once(_has_mean, [point.path for point in points]))


def _has_mean(checkpoint: Path) -> bool:
    try:
        return interval_mean.find(checkpoint) is not None
    except FormatError:  # two: told when they are to be used
        return False


def located(points: Sequence[TrajectoryPoint]) -> list[Path]:
    """Where the mean of each checkpoint is. Raises UsageError that lists those without one."""
    found = each_at_once(interval_mean.find, [point.path for point in points])
    lacking = [point.path for point, path in zip(points, found, strict=True) if path is None]
    if lacking:
        shown = ", ".join(map(str, lacking[:_LISTED]))
        more = f" and {len(lacking) - _LISTED} more" if len(lacking) > _LISTED else ""
        raise UsageError(
            f"--use interval-means: no mean is stored beside {len(lacking)} of the window's {len(points)} "
            f"checkpoints: {shown}{more}; choose another window, or average the checkpoints themselves"
        )
    return [path for path in found if path is not None]


def records(points: Sequence[TrajectoryPoint], *, mixed: bool) -> list[IntervalMean]:
    """What each checkpoint's mean is of. `mixed`: also where they were recorded differently, or overlap.

    Raises UsageError where one has none, FormatError for a damaged record, MismatchError where a mean does
    not end at its checkpoint, or they do not fit together.
    """
    means_N = each_at_once(interval_mean.read_record, located(points))
    for point, mean in zip(points, means_N, strict=True):
        if point.step is not None and not point.step - mean.every < mean.last_step <= point.step:
            raise MismatchError(
                f"the interval mean of {point.path} ends at step {mean.last_step}, expected step "
                f"{point.step}; it is another checkpoint's"
            )
    if not mixed:
        for what in ("averaged", "every"):
            _check_one(what, points, means_N)
        _check_apart(means_N)
    return means_N


def _check_one(what: str, points: Sequence[TrajectoryPoint], means_N: Sequence[IntervalMean]) -> None:
    newest = getattr(means_N[-1], what)
    for point, mean in zip(points, means_N, strict=True):
        if getattr(mean, what) != newest:
            raise MismatchError(
                f"the interval mean of {point.path} was recorded differently: {what} {getattr(mean, what)}, "
                f"but {newest} beside the newest; end or shorten the window where that changed, or say how "
                "much each counts with --weights"
            )


def _check_apart(means_N: Sequence[IntervalMean]) -> None:
    for before, after in pairwise(sorted(means_N, key=lambda mean: mean.first_step)):
        if after.first_step <= before.last_step:
            raise MismatchError(
                f"interval means overlap: one is of steps {before.first_step} to {before.last_step}, one of "
                f"{after.first_step} to {after.last_step}, so some steps would count twice; choose another "
                "window, or say how much each counts with --weights"
            )


def weighed(weights_N: Sequence[float], means_N: Sequence[IntervalMean]) -> list[float]:
    """A scheme's weights times the means' updates, which for equal weights gives the mean over all updates;
    as they are, to the bit, where all have equally many.
    """
    if len({mean.updates for mean in means_N}) == 1:
        return list(weights_N)
    scaled_N = np.asarray(weights_N, np.float64) * np.array([mean.updates for mean in means_N], np.float64)
    return [float(weight) for weight in averaging.given(scaled_N / scaled_N.sum())]


def with_means(
    points: Sequence[TrajectoryPoint],
    readers: Sequence[CheckpointReader],
    opened: MutableMapping[Path, CheckpointReader],
    averaged: Callable[[TensorSpec], bool],
) -> list[CheckpointReader]:
    """The readers, with those of their tensors that are `averaged` as the stored means have them.

    `opened`: readers of means to share with other plans, by path.
    """
    found = located(points)
    missing = [path for path in dict.fromkeys(found) if path not in opened]
    opened.update(zip(missing, each_at_once(interval_mean.open_reader, missing), strict=True))
    names = [[n for n, spec in reader.tensors.items() if averaged(spec)] for reader in readers]
    made = [MeanReader(r, opened[p], n) for r, p, n in zip(readers, found, names, strict=True)]
    return cast(list[CheckpointReader], made)


def read_from(reader: CheckpointReader, tensor: str) -> str:
    """Where a tensor is read from, for messages."""
    inner = reader.inner if isinstance(reader, ConvertedReader) else reader
    from_mean = isinstance(inner, MeanReader) and (inner is not reader or inner.is_averaged(tensor))
    return f"the interval mean of {reader.path}" if from_mean else str(reader.path)


def described(means_N: Sequence[IntervalMean]) -> dict[str, Any]:
    """What the means are of together, as plain values: steps, updates, and the steps that are in none."""
    ordered = sorted(means_N, key=lambda mean: mean.first_step)
    gaps = [
        [before.last_step + 1, after.first_step - 1]
        for before, after in pairwise(ordered)
        if after.first_step > before.last_step + max(before.every, after.every)
    ]
    return {
        "first_step": ordered[0].first_step,
        "last_step": max(mean.last_step for mean in ordered),
        "updates": sum(mean.updates for mean in ordered),
        "updates_missing": sum(mean.steps_spanned - mean.updates for mean in ordered),
        "gaps": gaps,
        "every": sorted({mean.every for mean in ordered}),
        "averaged": sorted({mean.averaged for mean in ordered}),
        "intervals": [asdict(mean) for mean in means_N],
    }
