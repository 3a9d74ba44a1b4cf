"""Where a schedule's rate changes, compressed: what the multi-power law sums over, at the rows of a curve.

The law sums over every step at which the rate changed, for every row: 72,000 × 546 powers for a long cosine.
Stretches at one rate drop out. A stretch of changes alike is replaced by two nodes of Gauss' rule for
that very stretch: sums of anything cubic over it are exact, and the response is smooth on the scale of its
distance. So a row has short stretches near it, longer ones further away, and far away chunks of rows.
"""

# R rows, J nodes, G groups of neighbouring changes, K changes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.forecast.schedules import Schedule

# the stretch that ends at a row, where the response is steepest; they double away from the row, as the
# response grows smoother, up to a share of the schedule
NEAREST_STEPS = 16
_LONGEST_SHARE = 1 / 200
# the same of stretches that are seen from afar only, as shares of the schedule
_FAR_NEAREST_SHARE, _FAR_LONGEST_SHARE = 1 / 400, 1 / 50
# changes of a group that are summed one by one: no more than the nodes that would replace them
_FEW = 2
# the rate of a node is at least this share of the peak: the law takes its logarithm
_LEAST_RATE = 1e-30
# a group's rates stay within this factor, as the law takes a power of them: a warmup begins at 0
_RATE_FACTOR = 2**0.5


# rows of a chunk: what lies at least one whole chunk back is seen in stretches of a chunk
_CHUNK_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """R rows of a schedule: `steps_R`, S1 there (`sums_R`), and which nodes each sums over: those before
    `far_R`, and those from `near_R` up to `ends_R`.

    J nodes: what the rate loses (`gap_J`), the sum of rates before (`before_J`), the logarithm of the rate
    (`log_rate_J`). `gaps_T`: what the rate loses at each step up to the last row, for laws that need all.
    """

    steps_R: NDArray[np.int64]
    sums_R: NDArray[np.float64]
    far_R: NDArray[np.int64]
    near_R: NDArray[np.int64]
    ends_R: NDArray[np.int64]
    gap_J: NDArray[np.float64]
    before_J: NDArray[np.float64]
    log_rate_J: NDArray[np.float64]
    gaps_T: NDArray[np.float64]


def compress(schedule: Schedule, steps_R: NDArray[np.int64], *, nearest_steps: int = NEAREST_STEPS) -> Gaps:
    """The changes of `schedule` up to the last of `steps_R`, which rise and lie within it.

    `nearest_steps`: the length of the stretch before a row that two nodes stand for; 0 keeps every change.
    """
    assert 0 < steps_R[-1] <= schedule.last_step
    gaps_T = schedule.gaps[: steps_R[-1] + 1]
    changes_K = np.flatnonzero(gaps_T)
    gap_K = gaps_T[changes_K]
    log_rate_K = np.log(np.maximum(schedule.rates_T[changes_K], _LEAST_RATE * schedule.peak_rate))
    sort_K = np.sign(gap_K) + 4 * np.floor(log_rate_K / np.log(_RATE_FACTOR))
    starts = np.arange(len(changes_K))
    if nearest_steps:
        longest = max(nearest_steps, int(_LONGEST_SHARE * steps_R[-1]))
        starts = _group_starts(changes_K, sort_K, steps_R, nearest_steps, longest)
    near_at, near_gap = _nodes(changes_K, gap_K, starts)
    far_at, far_gap = np.zeros(0), np.zeros(0)
    # a row looks back over its own chunk and the one before change by change; the chunks end at these steps
    seen_near_from_R = np.zeros(len(steps_R), dtype=np.int64)
    if nearest_steps:
        chunk_ends = steps_R[_CHUNK_ROWS - 1 :: _CHUNK_ROWS]
        ends = np.append(chunk_ends, steps_R[-1] + 1)
        nearest, longest = (
            1 + int(share * steps_R[-1]) for share in (_FAR_NEAREST_SHARE, _FAR_LONGEST_SHARE)
        )
        starts = _group_starts(changes_K, sort_K, ends, nearest, longest)
        far_at, far_gap = _nodes(changes_K, gap_K, starts)
        whole_R = np.maximum(np.arange(len(steps_R)) // _CHUNK_ROWS - 1, 0)
        seen_near_from_R = np.append(0, chunk_ends)[whole_R]
    every = np.arange(schedule.last_step + 1)
    at_J = np.concatenate((far_at, near_at))
    rate_J = np.interp(at_J, every, schedule.rates_T)
    return Gaps(
        steps_R=steps_R,
        sums_R=schedule.sums[steps_R],
        far_R=np.searchsorted(far_at, seen_near_from_R, side="right"),
        near_R=len(far_at) + np.searchsorted(near_at, seen_near_from_R, side="right"),
        ends_R=len(far_at) + np.searchsorted(near_at, steps_R, side="right"),
        gap_J=np.concatenate((far_gap, near_gap)),
        before_J=np.interp(at_J - 1, every, schedule.sums),
        log_rate_J=np.log(np.maximum(rate_J, _LEAST_RATE * schedule.peak_rate)),
        gaps_T=gaps_T,
    )


def _nodes(
    changes_K: NDArray[np.int64], gap_K: NDArray[np.float64], firsts_G: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places, rising, and gaps of the nodes that stand for the groups that begin at `firsts_G`."""
    sizes_G = np.diff(np.append(firsts_G, len(changes_K)))
    few_K = np.repeat(sizes_G <= _FEW, sizes_G)
    at, gap = _two_nodes(changes_K[~few_K], gap_K[~few_K], sizes_G[sizes_G > _FEW])
    at = np.concatenate((changes_K[few_K], at))
    order = np.argsort(at, kind="stable")
    return at[order], np.concatenate((gap_K[few_K], gap))[order]


def _group_starts(
    changes_K: NDArray[np.int64],
    sort_K: NDArray[np.float64],
    ends: NDArray[np.int64],
    nearest: int,
    longest: int,
) -> NDArray[np.int64]:
    """The first change of each group: of one sort, between the same two of `ends`, in one of the stretches
    that double away from the later end, the first of them `nearest` steps, and end at multiples of `longest`.
    """
    if not len(changes_K):
        return np.zeros(0, dtype=np.int64)
    end_K = np.searchsorted(ends, changes_K, side="left")
    before_K = ends[end_K] - changes_K
    level_K = np.floor(np.log2(before_K / nearest + 1)).astype(np.int64)
    new = (np.diff(end_K) != 0) | (np.diff(sort_K) != 0)
    new |= (np.diff(level_K) != 0) | (np.diff(before_K // longest) != 0)
    return np.concatenate(([0], np.flatnonzero(new) + 1)).astype(np.int64)


def _two_nodes(
    changes: NDArray[np.int64], gap: NDArray[np.float64], sizes_G: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two nodes and weights a group, by the moments 0 to 3 of its changes, as Gauss' rule takes them."""
    if not len(sizes_G):
        return np.zeros(0), np.zeros(0)
    firsts_G = np.concatenate(([0], np.cumsum(sizes_G)[:-1]))
    total_G = np.add.reduceat(gap, firsts_G)
    centre_G = np.add.reduceat(gap * changes, firsts_G) / total_G
    x = changes - np.repeat(centre_G, sizes_G)
    second_G = np.add.reduceat(gap * x**2, firsts_G) / total_G
    third_G = np.add.reduceat(gap * x**3, firsts_G) / total_G
    # around the mean the orthogonal polynomial is x² - (m3/m2) x - m2
    half_G = third_G / second_G / 2
    root_G = np.sqrt(half_G**2 + second_G)
    low_G, high_G = half_G - root_G, half_G + root_G
    share_G = high_G / (high_G - low_G)  # of the lower node, so that the mean stays
    at = np.concatenate((centre_G + low_G, centre_G + high_G))
    return at, np.concatenate((total_G * share_G, total_G * (1 - share_G)))
