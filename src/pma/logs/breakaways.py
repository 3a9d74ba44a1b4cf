"""Where a training curve breaks away upwards: pure functions on arrays, looking at the past only.

A value is compared with the median of earlier values; what is left is compared with what was usually left, in
MADs (medians of absolute deviations), so that a falling loss, a noisy one and a rounded one are all judged by
their own past. Thresholds, and how often healthy curves pass them: docs/spikes.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.logs.curves import Quantity, TrainingCurves

# in entries of the log
_LEVEL = 16  # whose median is the level
_LAG = 8  # between the level and the value judged, so that a slow rise does not lift its own level
_SCALE = 64  # residuals whose median and MAD are the measure
_FEWEST = 32  # residuals before anything is judged
_BACK = 5  # in a row inside: the curve has returned
_BLIP = 3  # at most so many outside before it returned: a blip
_LASTING = 10  # outside at the end of the log, at least: a collapse


class Kind(Enum):
    """What became of a breakaway."""

    BLIP = "blip"
    SPIKE = "spike"
    COLLAPSE = "collapse"
    NOT_A_NUMBER = "not a number"
    UNSETTLED = "unsettled"

    @property
    def words(self) -> str:
        """For people."""
        return {
            Kind.BLIP: f"at most {_BLIP} logged values, then as before",
            Kind.SPIKE: "a rise that came back",
            Kind.COLLAPSE: "a rise that did not come back",
            Kind.NOT_A_NUMBER: "NaN or infinity",
            Kind.UNSETTLED: "at the end of the log, too short to tell",
        }[self]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a value has broken away, in MADs above the level: `single` for one value, `sustained` for the
    median of eight; below `inside` it is back. `least_mad`: the least that a MAD counts as, a share of the
    level.
    """

    single: float
    sustained: float
    inside: float
    least_mad: float


THRESHOLDS: Mapping[Quantity, Thresholds] = {
    "loss": Thresholds(single=16, sustained=5, inside=4, least_mad=1e-3),
    "grad_norm": Thresholds(single=40, sustained=12, inside=6, least_mad=0.02),
}


@dataclass(frozen=True, kw_only=True)
class Breakaway:
    """One breakaway, from the first value outside to the last.

    `good_step`: the last value logged before it; updates after that step may have brought it about.
    `seen_step`: where it could be told first, from the past alone. `level`: the median before, NaN where
    there is too little past. `size_mads`: the peak above the level in MADs (of the logarithm for gradient
    norms), infinite for NaN. `entries`: logged values from first to last.
    """

    quantity: Quantity
    kind: Kind
    good_step: int
    first_step: int
    seen_step: int
    peak_step: int
    last_step: int
    entries: int
    level: float
    peak: float
    size_mads: float


def breakaways(curves: TrainingCurves) -> tuple[Breakaway, ...]:
    """Those of the loss and of the gradient norm, by first step."""
    found = [b for quantity in THRESHOLDS for b in find(*curves.series(quantity), quantity)]
    return tuple(sorted(found, key=lambda b: (b.first_step, b.quantity != "loss")))


def find(
    steps: NDArray[np.int64], values: ArrayLike, quantity: Quantity, thresholds: Thresholds | None = None
) -> list[Breakaway]:
    """The breakaways of one curve. `steps` and `values`: one dimension, of one length, steps rising.

    Gradient norms are judged by their logarithm: they vary by factors.
    """
    limits = thresholds or THRESHOLDS[quantity]
    raw = np.asarray(values, dtype=np.float64)
    judged = raw
    if quantity == "grad_norm":
        with np.errstate(divide="ignore", invalid="ignore"):
            judged = np.log(np.where(raw == 0, np.finfo(np.float64).tiny, raw))
    scale_of: Callable[[float], float] = (lambda _: 1.0) if quantity == "grad_norm" else abs
    found = []
    for first, seen, last, baseline, returned in _intervals(judged, limits, scale_of):
        inside = judged[first : last + 1]
        outside = sum(baseline.mads(value) >= limits.inside for value in inside.tolist())
        peak = first + int(np.argmax(np.where(np.isfinite(inside), inside, np.inf)))
        level = math.exp(baseline.level) if quantity == "grad_norm" else baseline.level
        found.append(
            Breakaway(
                quantity=quantity,
                kind=_kind(bool(np.isfinite(inside).all()), outside, returned),
                good_step=int(steps[max(first - 1, 0)]),
                first_step=int(steps[first]),
                seen_step=int(steps[seen]),
                peak_step=int(steps[peak]),
                last_step=int(steps[last]),
                entries=last - first + 1,
                level=level,
                peak=float(raw[peak]),
                size_mads=baseline.mads(float(judged[peak])),
            )
        )
    return found


def _kind(finite: bool, outside: int, returned: bool) -> Kind:
    if not finite:
        return Kind.NOT_A_NUMBER
    if returned:
        return Kind.BLIP if outside <= _BLIP else Kind.SPIKE
    return Kind.COLLAPSE if outside >= _LASTING else Kind.UNSETTLED


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """What values are compared with: `level` is their past median, `offset` and `mad` those of residuals."""

    level: float
    offset: float
    mad: float

    def mads(self, value: float) -> float:
        if not math.isfinite(value):
            return math.inf if value != -math.inf else -math.inf
        return (value - self.level - self.offset) / self.mad


# nothing finite is outside where nothing is known
_NOTHING_BEFORE = _Baseline(level=math.nan, offset=0.0, mad=math.nan)


class _Past:
    """The healthy past: values and residuals, in windows."""

    def __init__(self, limits: Thresholds, scale_of: Callable[[float], float]) -> None:
        self._limits = limits
        self._scale_of = scale_of
        self._values: deque[float] = deque(maxlen=_LEVEL)
        self._residuals: deque[float] = deque(maxlen=_SCALE)
        self._waiting: deque[tuple[float, float]] = deque()
        self._measured = 0
        self._offset = self._mad = math.nan
        self._added = 0

    def baseline(self) -> _Baseline | None:
        """The measure for the next value; None while there is too little past."""
        if len(self._residuals) < _FEWEST:
            return None
        # the measure moves slowly: taken again after every few residuals
        if self._added - self._measured >= _LAG or not self._measured:
            residuals = np.array(self._residuals)
            middle = float(np.median(residuals))
            self._mad = float(np.median(np.abs(residuals - middle)))
            # a fall is not extrapolated: where it flattens, as after a drop of the rate, nothing broke away
            self._offset = max(middle, 0.0)
            self._measured = self._added
        level = self._level()
        least = self._limits.least_mad * self._scale_of(level)
        return _Baseline(level=level, offset=self._offset, mad=max(self._mad, least, math.ulp(1.0)))

    def _level(self) -> float:
        ordered = sorted(self._values)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def add(self, value: float) -> None:
        """A healthy value, which counts after `_LAG` more."""
        residual = value - self._level() if len(self._values) == _LEVEL else math.nan
        self._waiting.append((value, residual))
        if len(self._waiting) > _LAG:
            old, residual = self._waiting.popleft()
            self._values.append(old)
            if math.isfinite(residual):
                self._residuals.append(residual)
                self._added += 1

    def forget(self, count: int) -> None:
        """Take back the newest `count` values: they were outside."""
        for _ in range(min(count, len(self._waiting))):
            self._waiting.pop()


def _intervals(
    values: NDArray[np.float64], limits: Thresholds, scale_of: Callable[[float], float]
) -> list[tuple[int, int, int, _Baseline, bool]]:
    """(first, seen, last, baseline, returned) of each breakaway, as indices."""
    past = _Past(limits, scale_of)
    found: list[tuple[int, int, int, _Baseline, bool]] = []
    recent: deque[float] = deque(maxlen=_LAG)  # MADs of the newest values
    open_at: tuple[int, int, int, _Baseline] | None = None
    for index, value in enumerate(values.tolist()):
        if open_at is not None:
            first, seen, last, baseline = open_at
            if baseline.mads(value) >= limits.inside or not math.isfinite(value):
                open_at = (first, seen, index, baseline)
            elif index - last >= _BACK:
                found.append((first, seen, last, baseline, True))
                open_at = None
                recent.clear()
                for back in values[last + 1 : index + 1].tolist():
                    past.add(back)
            continue
        current = past.baseline()
        if current is None:
            if math.isfinite(value):
                past.add(value)
            else:
                open_at = (index, index, index, _NOTHING_BEFORE)
            continue
        mads = current.mads(value)
        recent.append(mads)
        sustained = len(recent) == _LAG and float(np.median(recent)) >= limits.sustained
        if mads >= limits.single or sustained or not math.isfinite(value):
            outside = _trailing(recent, limits.inside)
            past.forget(outside - 1)
            open_at = (index - outside + 1, index, index, current)
        else:
            past.add(value)
    if open_at is not None:
        found.append((*open_at, False))
    return found


def _trailing(recent: deque[float], inside: float) -> int:
    """How many of the newest values were outside without a break, itself at least."""
    count = 1
    for mads in list(recent)[-2::-1]:
        if mads < inside:
            break
        count += 1
    return count
