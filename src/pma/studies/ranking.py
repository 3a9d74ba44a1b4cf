"""How well one figure of many windows tells another, with intervals that allow for windows that share
checkpoints: whole groups of them are drawn again.
"""

# W windows, G groups of them

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Statistic = Callable[[Values, Values], float]
DRAWS = 1_000


def rank_correlation(a_W: ArrayLike, b_W: ArrayLike) -> float:
    """Spearman's; zero where either does not vary."""
    a, b = (_ranks(each) for each in (a_W, b_W))
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length else 0.0


def _ranks(values_W: ArrayLike) -> Values:
    """Equal values share the mean of their ranks."""
    _, place_W, counts = np.unique(np.asarray(values_W), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place_W])


def ratio(a_W: ArrayLike, b_W: ArrayLike) -> float:
    """Σ b / Σ a."""
    return float(np.sum(b_W) / np.sum(a_W))


def by_groups(
    statistic: Statistic, a_W: Sequence[float], b_W: Sequence[float], group_W: Sequence[int]
) -> dict[str, float]:
    """The statistic with its 95% interval: percentiles over groups drawn with replacement."""
    a, b, groups = np.asarray(a_W), np.asarray(b_W), np.asarray(group_W)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = np.concatenate([members[g] for g in draw.integers(0, len(members), len(members))])
        drawn.append(statistic(a[chosen], b[chosen]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": statistic(a, b), "low": float(low), "high": float(high)}
