"""The fall of the loss, from logs whose curve is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pma.diagnosis.trend import gradient_norm, share_of_peak, shift, trend
from pma.logs import TrainingCurves
from pma.logs.curves import collect

EVERY = 25
random = np.random.default_rng(5)
SCATTER = random.standard_normal(400)


def curves(
    loss: Callable[[float], float],
    last_step: int = 3000,
    *,
    noise: float = 0.0,
    **more: Callable[[float], float],
) -> TrainingCurves:
    """A log of means over the steps since the entry before."""
    rows = []
    for number, step in enumerate(range(EVERY, last_step + 1, EVERY)):
        mean = np.mean([loss(s) for s in range(step - EVERY + 1, step + 1)])
        row = {"step": step, "loss": float(mean) + noise * SCATTER[number]}
        rows.append(row | {name: function(step) for name, function in more.items()})
    return collect(rows, ())


def power_law(step: float) -> float:
    return 3 + 20 * step**-0.5


@pytest.mark.parametrize(("first", "last"), [(2000, 3000), (2900, 3000), (400, 800)])
def test_a_power_law(first: int, last: int) -> None:
    found = trend(curves(power_law), first, last)
    assert found is not None
    steps = np.array([first, (first + last) / 2, last - 13])
    np.testing.assert_allclose(found.at(steps), [power_law(s) for s in steps], atol=0.004)
    assert found.scatter < 0.01


def test_noise_averages_out_and_an_outlier_does_not_count() -> None:
    log = curves(power_law, noise=0.03)
    log.loss[80] += 5.0  # step 2025
    found = trend(log, 2000, 3000)
    assert found is not None
    fell = float(found.at(2500) - found.at(2987))
    assert fell == pytest.approx(power_law(2500) - power_law(2987), abs=0.015)


def test_nothing_after_the_newest_checkpoint_is_looked_at() -> None:
    usual, other = curves(power_law), curves(lambda s: power_law(s) if s <= 1500 else 99.0)
    for first in (1000, 1400):
        assert trend(usual, first, 1500) == trend(other, first, 1500)
    assert gradient_norm(curves(power_law, grad_norm=lambda s: s), 1500) == pytest.approx(1500 - 3.5 * EVERY)


def test_a_phase_begins_anew() -> None:
    """Before step 2000 the loss stood still; what fell since is not thinned by that."""
    found = trend(curves(lambda s: 4 - max(s - 2000, 0) / 1000), 2200, 2500, phase_start=2000)
    assert found is not None
    assert float(found.at(2300) - found.at(2480)) == pytest.approx(0.18, abs=0.01)


def test_too_short_a_log() -> None:
    assert trend(curves(power_law, 100), 50, 100) is None
    assert gradient_norm(curves(power_law), 3000) is None
    assert share_of_peak(curves(power_law), 3000) == 1


def test_the_rates_share() -> None:
    log = curves(power_law, learning_rate=lambda s: 1e-3 * min(1, s / 100) * (1 if s < 2000 else 0.25))
    assert share_of_peak(log, 1000) == 1
    assert share_of_peak(log, 2500) == 0.25


@pytest.mark.parametrize("nats", [-0.2, 0.2])
def test_a_step_in_the_loss(nats: float) -> None:
    log = curves(lambda s: power_law(s) + (nats if s > 2600 else 0), noise=0.02)
    found = shift(log, 2200, 3000)
    assert found is not None
    assert (found.before_step, found.after_step) == (2600, 2625)
    assert found.nats == pytest.approx(nats, abs=0.04)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_smooth_fall_is_no_step(noise: float) -> None:
    log = curves(power_law, noise=noise)
    for first, last in ((100, 600), (1000, 2000), (2500, 3000)):
        assert shift(log, first, last) is None
