"""Which merges of a run are worth evaluating as probes of a decay: short and long ones, and how they fell.

Windows that end where the decay starts tell fast noise from slow; merges that end earlier tell how the
drift's loss falls, and better than raw checkpoints do, whose losses scatter.
"""

from __future__ import annotations

from collections.abc import Sequence

from pma.errors import InputError

USUAL = 10
FEWEST_CHECKPOINTS = 8
# a run's beginning falls in another way than the rest: ends begin at this share of the run, windows at that
_FIRST_END, _FIRST_STEP = 1 / 3, 0.2
_MOST_ENDS = 20
# a longer window has every second, every third … of its checkpoints
_MOST_CHECKPOINTS = 40


def probe_windows(steps: Sequence[int], from_step: int) -> list[tuple[int, ...]]:
    """Steps of the checkpoints of each model to evaluate, oldest first; single ones are raw checkpoints.

    `steps`: of all checkpoints at the constant rate, rising. The first is the checkpoint at `from_step`.
    Raises InputError where `from_step` is none of them, or they are too few.
    """
    if from_step not in steps:
        raise InputError(
            f"the decay starts at step {from_step}, of which there is no checkpoint at the constant rate; "
            f"there are steps {_listed(steps)}"
        )
    before = [step for step in steps if step <= from_step]
    usable = [step for step in before if step >= _FIRST_STEP * from_step]
    if len(usable) < FEWEST_CHECKPOINTS:
        raise InputError(
            f"{len(usable)} checkpoints at the constant rate from step {round(_FIRST_STEP * from_step)} to "
            f"{from_step}; a forecast from merges needs at least {FEWEST_CHECKPOINTS}"
        )
    usual = USUAL if len(usable) >= 2 * USUAL else max(2, len(usable) // 4)
    ends = _ends(usable, usual, from_step)
    windows: list[tuple[int, ...]] = [(from_step,)]
    windows += [_window(usable, len(usable) - 1, count) for count in _counts(len(usable), usual)]
    windows += [_window(usable, end, usual) for end in ends[1:]]
    windows += [(usable[end],) for end in ends[2::2]]
    return windows


def _ends(usable: Sequence[int], usual: int, from_step: int) -> list[int]:
    """Places of the ends of windows of `usual` checkpoints, newest first, neighbours sharing half."""
    stride = max(usual // 2, 1)
    first = next(i for i, step in enumerate(usable) if step >= _FIRST_END * from_step)
    while True:
        ends = list(range(len(usable) - 1, max(first, usual - 1) - 1, -stride))
        if len(ends) <= _MOST_ENDS:
            return ends
        stride += max(usual // 2, 1)


def _counts(checkpoints: int, usual: int) -> list[int]:
    """Lengths of windows, in checkpoints: up to the usual one, and its doubles as far as there are any."""
    counts = {count for count in (2, max(2, round(0.4 * usual)), usual) if count <= checkpoints}
    while usual * 2 <= checkpoints:
        usual *= 2
        counts.add(usual)
    return sorted(counts)


def _window(usable: Sequence[int], end: int, count: int) -> tuple[int, ...]:
    stride = -(-count // _MOST_CHECKPOINTS)
    return tuple(reversed([usable[i] for i in range(end, end - count, -stride)]))


def _listed(steps: Sequence[int], most: int = 8) -> str:
    shown = [str(step) for step in steps]
    if len(shown) > most:
        shown = [*shown[:2], "…", *shown[2 - most :]]
    return ", ".join(shown) if shown else "none"
