"""Power-function averages against closed forms and published numbers."""

import numpy as np
import pytest
from numpy.polynomial import Polynomial

from pma.averaging.power_ema import (
    gamma_from_sigma,
    inner_product,
    power_profile,
    reconstruct,
    share_kept,
    sigma_from_gamma,
    steps_profile,
    window_profile,
)
from pma.errors import UsageError


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.972), (0.10, 6.937), (0.15, 3.558), (0.25, 0.720)])
def test_published_exponents(sigma: float, gamma: float) -> None:
    """Karras et al., table of appendix C, to the digits printed."""
    assert gamma_from_sigma(sigma) == pytest.approx(gamma, abs=2e-3)
    assert sigma_from_gamma(gamma_from_sigma(sigma)) == pytest.approx(sigma, rel=1e-12)


def test_sigma_is_the_deviation_of_the_power_function() -> None:
    """Moments of t^γ on [0, 1] for whole γ, by exact integration."""
    for gamma in (1, 3, 7):
        density = Polynomial([0] * gamma + [gamma + 1])
        moments = [(density * Polynomial([0] * k + [1])).integ()(1.0) for k in (1, 2)]
        assert sigma_from_gamma(gamma) == pytest.approx(np.sqrt(moments[1] - moments[0] ** 2), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_widths_that_no_power_function_has(sigma: float) -> None:
    with pytest.raises(UsageError, match="relative width"):
        gamma_from_sigma(sigma)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("first", [1, 8])
def test_a_profile_is_what_the_recursion_does(first: int, every: int) -> None:
    """Unit vectors as weights: after the recursion the average itself is its profile."""
    gamma, last = 2.5, 40
    recorded = [step for step in range(first, last + 1) if step == first or step % every == 0]
    average = np.zeros(last)
    before = 0
    for step in recorded:
        kept = share_kept(gamma, before, step) if before else 0.0
        average = kept * average + (1 - kept) * np.eye(last)[step - 1]
        before = step
    profile = power_profile(gamma, recorded[-1], first_step=first, every=every)
    found = profile(np.arange(1, last + 1))
    assert np.allclose(found, average, rtol=1e-12, atol=1e-15)
    assert found.sum() == pytest.approx(1, rel=1e-12)


def test_inner_products_are_those_of_the_profiles() -> None:
    """Against exact integrals for whole γ, and against sums over many steps."""
    for (a, end_a), (b, end_b) in (((1, 1.0), (1, 1.0)), ((3, 0.5), (2, 2.0)), ((2, 2.0), (3, 0.5))):
        density_a, density_b = (
            Polynomial([0] * g + [(g + 1) / end ** (g + 1)]) for g, end in ((a, end_a), (b, end_b))
        )
        expected = (density_a * density_b).integ()(min(end_a, end_b))
        assert inner_product(a, end_a, b, end_b) == pytest.approx(expected, rel=1e-12)
    steps = np.arange(1, 20_001)
    p, q = power_profile(6.9, 15_000)(steps), power_profile(0.7, 20_000)(steps)
    assert p @ q == pytest.approx(inner_product(6.9, 15_000, 0.7, 20_000), rel=1e-3)


def test_a_stored_profile_is_found_again() -> None:
    stored = [power_profile(gamma, last) for gamma in (16.97, 6.94) for last in (50, 75, 100)]
    for number, target in enumerate(stored):
        found = reconstruct(stored, target, 100)
        assert found.relative_error < 1e-12
        assert np.allclose(found.coefficients, np.eye(len(stored))[number], atol=1e-9)


def test_the_fit_is_the_best_with_coefficients_that_sum_to_one() -> None:
    """Against the solution of the Lagrange system in numpy, and against small changes of it."""
    steps = np.arange(1, 201)
    stored = [
        power_profile(gamma_from_sigma(sigma), last) for sigma in (0.05, 0.1) for last in (100, 150, 200)
    ]
    target = power_profile(gamma_from_sigma(0.07), 200)
    found = reconstruct(stored, target, 200)
    profiles_TK, target_T = np.column_stack([p(steps) for p in stored]), target(steps)
    count = len(stored)
    system = np.block(
        [[profiles_TK.T @ profiles_TK, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]]
    )
    solution = np.linalg.solve(system, np.append(profiles_TK.T @ target_T, 1.0))[:count]
    assert np.allclose(found.coefficients, solution, rtol=1e-6, atol=1e-8)
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-12)
    error = np.linalg.norm(profiles_TK @ np.array(found.coefficients) - target_T) / np.linalg.norm(target_T)
    assert found.relative_error == pytest.approx(error, rel=1e-6)
    generator = np.random.default_rng(0)
    for _ in range(20):
        change = generator.normal(size=count) * 1e-3
        other = profiles_TK @ (np.array(found.coefficients) + change - change.mean()) - target_T
        assert np.linalg.norm(other) >= error * np.linalg.norm(target_T)


def test_other_widths_and_windows_come_out_of_two_tracks() -> None:
    """A window with hard ends is harder than another width, and the error says so."""
    stored = [power_profile(gamma_from_sigma(s), last) for s in (0.05, 0.1) for last in range(100, 2001, 100)]
    width = reconstruct(stored, power_profile(gamma_from_sigma(0.15), 2000), 2000)
    window = reconstruct(stored, window_profile(1001, 2000), 2000)
    assert width.relative_error < 0.01
    assert 0.02 < window.relative_error < 0.3


def test_blocks_of_steps_change_nothing() -> None:
    import pma.averaging.power_ema as module

    stored = [power_profile(6.9, last) for last in (300, 600, 1000)]
    target = window_profile(500, 900)
    whole = reconstruct(stored, target, 1000)
    before, module._STEPS_AT_ONCE = module._STEPS_AT_ONCE, 37
    try:
        blocks = reconstruct(stored, target, 1000)
    finally:
        module._STEPS_AT_ONCE = before
    assert np.allclose(whole.coefficients, blocks.coefficients)
    assert whole.relative_error == pytest.approx(blocks.relative_error)


def test_given_steps_are_a_target() -> None:
    found = steps_profile({3: 0.25, 5: 0.75})(np.arange(1, 7))
    assert found.tolist() == [0, 0, 0.25, 0, 0.75, 0]


def test_requests_that_cannot_be_met() -> None:
    with pytest.raises(UsageError, match="no track is stored"):
        reconstruct([], window_profile(1, 5), 5)
    with pytest.raises(UsageError, match="no weight"):
        reconstruct([power_profile(1.0, 5)], window_profile(8, 9), 5)
