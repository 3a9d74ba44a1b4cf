"""What windows are predicted to gain: limits in closed form, and constants found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pma.diagnosis.calibrating import FITTED, fitted
from pma.diagnosis.evidence import Basis, Evidence, noisy_step
from pma.diagnosis.prediction import Constants, calibration, predict
from pma.errors import UsageError
from pma.logs.curves import collect

CONSTANTS = Constants(
    scale=-1.5,
    power=0.5,
    rate_power=1.0,
    spread_steps=5.0,
    drift=1.0,
    bend=0.5,
    settled=0.2,
    error=0.01,
    error_of_cost=0.1,
)
USUAL = Evidence(
    count=10,
    noisy_step=0.1,
    weights=30.0,
    spread=10.0,
    gradient=2.0,
    rate_share=1.0,
    fall=0.02,
    bend=0.004,
)


def test_independent_checkpoints_keep_one_part_in_n_of_the_noise() -> None:
    """Spread far, the noise exp(-1.5) · sqrt(2 · 0.1) is all but a tenth averaged away."""
    found = predict(replace(USUAL, spread=1e9), CONSTANTS)
    assert found.noise == pytest.approx(0.9 * np.exp(-1.5) * np.sqrt(0.2))
    assert found.cost == pytest.approx(0.022)
    assert found.gain == pytest.approx(found.noise - found.cost)
    assert found.error == pytest.approx(np.hypot(0.01, 0.0022))


def test_checkpoints_in_one_place_gain_nothing() -> None:
    assert predict(replace(USUAL, spread=0.0, fall=0.0, bend=0.0), CONSTANTS).gain == 0
    assert predict(replace(USUAL, noisy_step=0.0, spread=0.0), CONSTANTS).noise < 1e-9


def test_the_weights_unit_does_not_matter() -> None:
    """A model whose weights are written a hundred times larger has gradients a hundred times smaller."""
    larger = replace(USUAL, noisy_step=10.0, weights=3000.0, spread=10.0 * 1e4, gradient=0.02)
    for one, other in ((USUAL, larger), (replace(USUAL, gradient=None), replace(larger, gradient=None))):
        assert predict(one, CONSTANTS).gain == pytest.approx(predict(other, CONSTANTS).gain)


def test_a_lower_rate_leaves_less_noise() -> None:
    usual, half = predict(USUAL, CONSTANTS), predict(replace(USUAL, rate_share=0.5), CONSTANTS)
    assert half.noise == pytest.approx(usual.noise / 2)
    assert half.cost == pytest.approx(usual.cost * 0.6)


def test_noise_is_told_from_drift() -> None:
    """Of a random walk each step's length is the noise's; of a straight line nearly nothing is."""
    steps = np.arange(0.0, 250, 25)
    random_walk = -np.abs(steps[:, None] - steps) / 2  # any gram with squared distances |t|
    assert noisy_step(steps, random_walk) == pytest.approx(1.0)
    line = np.outer(steps, steps)
    assert noisy_step(steps, line) < 0.35 * np.sqrt(25)
    both = random_walk + 0.01 * line
    assert noisy_step(steps, both) == pytest.approx(1.0, rel=0.15)


def test_evidence_of_a_window_in_closed_form() -> None:
    """Checkpoints of independent noise of variance 3, and a loss that falls linearly in the logarithm."""
    steps = np.arange(100.0, 1001, 100)
    log = collect(
        [{"step": s, "loss": 8 - np.log(s - 12.5), "grad_norm": 2.0} for s in range(25, 1001, 25)], ()
    )
    basis = Basis(
        steps_M=steps.tolist(), deviations_MM=3 * np.eye(10), weights=7.0, curves=log, phase_start=0.0
    )
    found = basis.window([3, 6, 9])
    assert found is not None
    assert found.count == 3
    # around their own mean three of ten have two thirds of the variance
    assert found.spread == pytest.approx(3 * (1 - 1 / 3))
    assert (found.gradient, found.rate_share, found.weights) == (2.0, 1.0, 7.0)
    now = 1000 - 12.5  # the newest entry is the mean of the steps before
    assert found.fall == pytest.approx(np.log(now / 700), abs=0.02)
    assert found.bend == pytest.approx(np.log(700) - np.log([400, 700, now]).mean(), abs=0.02)


def test_constants_are_found_again() -> None:
    random = np.random.default_rng(0)
    known = [
        Evidence(
            count=int(random.integers(2, 16)),
            noisy_step=float(np.exp(random.uniform(-4, 0))),
            weights=30.0,
            spread=0.0,
            gradient=float(np.exp(random.uniform(-1, 1))),
            rate_share=float(random.choice([1.0, 1.0, 0.3])),
            fall=float(random.uniform(0, 0.3)),
            bend=float(random.uniform(0, 0.1)),
        )
        for _ in range(300)
    ]
    known = [replace(e, spread=float(random.uniform(1, 30)) * e.noisy_step**2) for e in known]
    truth = replace(CONSTANTS, drift=0.9, rate_power=0.7)
    gains = [predict(e, truth).gain + 0.01 * random.standard_normal() for e in known]
    gains[3] += 5.0  # one window went wrong
    found = fitted(known, gains, gradient=True)
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.15), name
    without = [e for n, e in enumerate(known) if n != 3]
    misses = [predict(e, found).gain - predict(e, truth).gain for e in without]
    assert np.abs(misses).max() < 0.02


def test_the_calibration_that_comes_along() -> None:
    found = calibration()
    for constants in found.values():
        assert 0.5 < constants.drift < 1.5
        assert 0 < constants.error < 0.1
    with pytest.raises(UsageError, match="no calibration 'mine'"):
        calibration("mine")
