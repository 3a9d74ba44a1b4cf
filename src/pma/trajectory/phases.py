"""The phase a checkpoint's weights were made in, told from the learning rates the trainer logged."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum

# logged constant rates are equal to the bit; a cosine moves by more than this within its first 0.01%
_SAME_RATE = 1e-9


class Phase(Enum):
    """Where in warmup-stable-decay a checkpoint lies."""

    WARMUP = "warmup"
    STABLE = "stable"
    DECAY = "decay"
    UNKNOWN = "unknown"


def phase_at(step: int, learning_rates: Sequence[tuple[int, float]]) -> Phase:
    """Phase of the updates that led to `step`, from the rate logged last up to it and its neighbours.

    A rate is logged with the step it was used in. It is stable if the log before or after shows the same, so
    a checkpoint where a decay starts is still stable, and one just after the warmup is so already.
    """
    end = bisect_right(learning_rates, step, key=lambda point: point[0])
    if end == 0 or len(learning_rates) < 2:
        return Phase.UNKNOWN
    rate = learning_rates[end - 1][1]
    before = learning_rates[end - 2][1] if end >= 2 else None
    after = learning_rates[end][1] if end < len(learning_rates) else None
    if _same(rate, before) or _same(rate, after):
        return Phase.STABLE
    if before is None:
        return Phase.WARMUP if after is not None and after > rate else Phase.DECAY
    return Phase.WARMUP if rate > before else Phase.DECAY


def _same(rate: float, other: float | None) -> bool:
    return other is not None and abs(rate - other) <= _SAME_RATE * max(abs(rate), abs(other))
