"""The best rate between those tried: where it is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from pma.studies.optimum import optima_ratio, optimum

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TOKENS_D = np.full(50, 100)


def nats(best: float, spread: float = 0.0) -> np.ndarray:
    """Parabolas in log rate, whose lowest points differ by document, shape (R, D)."""
    centre_D = np.log(best) + np.random.default_rng(0).normal(0, spread, 50)
    loss_RD = 3 + 0.2 * (np.log(RATES)[:, None] - centre_D) ** 2
    return loss_RD * TOKENS_D


def test_a_parabola_s_vertex_is_found_exactly() -> None:
    found = optimum(RATES, nats(2.7e-3), TOKENS_D)
    assert (found.rate, found.low, found.high) == pytest.approx((2.7e-3,) * 3)
    assert not found.at_the_edge


def test_the_interval_is_that_of_the_mean_of_the_documents() -> None:
    """All documents' parabolas have one curvature, so the vertex is the mean of theirs."""
    spread = 0.3
    found = optimum(RATES, nats(2.7e-3, spread), TOKENS_D)
    centre_D = np.log(2.7e-3) + np.random.default_rng(0).normal(0, spread, 50)
    error = centre_D.std(ddof=1) / np.sqrt(50)
    assert np.log(found.rate) == pytest.approx(centre_D.mean())
    assert np.log(found.high / found.low) == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_at_the_edge_nothing_is_extrapolated() -> None:
    found = optimum(RATES, nats(2e-2), TOKENS_D)
    assert found.rate == pytest.approx(8e-3)
    assert found.at_the_edge


def test_of_two_kinds_the_same_documents_are_drawn() -> None:
    """What documents do to both alike is not in the interval of their ratio."""
    found = optima_ratio(RATES, nats(4e-3, 0.3), nats(2e-3, 0.3), TOKENS_D)
    assert (found.rate, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0), rel=1e-6)
