"""Correlations against scipy, and intervals that draw whole groups."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from pma.studies import ranking


def test_rank_correlation_is_spearmans():
    draw = np.random.default_rng(0)
    a = draw.integers(0, 6, 30).astype(float)  # with ties
    b = a + 2 * draw.standard_normal(30)
    assert ranking.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert ranking.rank_correlation(a, np.ones(30)) == 0


def test_the_interval_is_that_of_groups_not_of_windows():
    draw = np.random.default_rng(1)
    base_a, base_b = draw.standard_normal(8), draw.standard_normal(8)
    once = ranking.by_groups(ranking.rank_correlation, base_a, base_b, range(8))
    # windows said again and again tell nothing new
    again = ranking.by_groups(
        ranking.rank_correlation, np.repeat(base_a, 5), np.repeat(base_b, 5), np.repeat(range(8), 5)
    )
    assert again == pytest.approx(once)
    assert once["low"] < once["value"] < once["high"]


def test_a_ratio_that_is_the_same_in_every_group_is_certain():
    a = np.array([1.0, 2.0, 3.0])
    assert ranking.by_groups(ranking.ratio, a, 2 * a, [0, 1, 2]) == pytest.approx(
        {"value": 2, "low": 2, "high": 2}
    )
