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
    """Phase of the updates that led to `step`: whether the last two rates logged up to it rose, stood or fell.

    A rate is logged with the step it was used in, so a checkpoint at the very start of a decay is still stable.
    """
    end = bisect_right(learning_rates, step, key=lambda point: point[0])
    if end == 0 or not learning_rates:
        return Phase.UNKNOWN
    if end == 1:
        # only one rate so far: the next one tells whether it is on the way up
        if len(learning_rates) < 2:
            return Phase.UNKNOWN
        end = 2
    before, after = learning_rates[end - 2][1], learning_rates[end - 1][1]
    if abs(after - before) <= _SAME_RATE * max(abs(after), abs(before)):
        return Phase.STABLE
    return Phase.WARMUP if after > before else Phase.DECAY
