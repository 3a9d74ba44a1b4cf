from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pma.errors import InputError
from pma.forecast.curves import MOST_ROWS, Curve, counted_once, curve_of
from pma.forecast.fitting import fit, long_run_variance
from pma.forecast.laws import LAWS, MULTI_POWER, Law, loss
from pma.forecast.schedules import Schedule
from pma.forecast.uncertainty import bootstrap, held_out

from . import curves as made
from .curves import constant, half_cosine, line, warmed

Floats = NDArray[np.float64]
DROP = warmed(constant(4000), 0.2 * constant(3000))
COSINE = warmed(half_cosine(8000, 0.1))
FLAT = warmed(constant(8000))


def curve(name: str, rates: Floats, every: int = 80, noise: float = 5e-4, seed: int = 0) -> Curve:
    steps = np.arange(made.WARMUP, len(rates), every)
    return curve_of(name, steps, made.losses(rates, steps, noise, seed), Schedule(rates_T=rates))


@pytest.fixture(scope="module")
def three() -> list[Curve]:
    return [curve("flat", FLAT, seed=1), curve("cosine", COSINE, seed=2), curve("drop", DROP, seed=3)]


def test_a_law_finds_its_own_parameters(three: list[Curve]) -> None:
    found = fit(MULTI_POWER, three)
    assert found.starts[0] >= 2
    for name in ("L0", "A", "alpha", "B"):
        assert found.parameters[name] == pytest.approx(made.MULTI_POWER[name], rel=0.15), name
    decayed = warmed(constant(6000), line(1500, 0.0))
    steps = np.arange(200, len(decayed), 100)
    forecast = loss(MULTI_POWER, found.parameters, Schedule(rates_T=decayed), steps)
    truth = made.losses(decayed, steps)
    assert np.abs(forecast - truth).mean() < 1e-3
    assert abs(forecast[-1] - truth[-1]) < 3e-3
    # the same seed is the same fit, and another finds the same minimum
    assert fit(MULTI_POWER, three).theta_P.tolist() == found.theta_P.tolist()
    assert fit(MULTI_POWER, three, seed=5).cost == pytest.approx(found.cost, rel=1e-3)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_fit_has_no_units(law: Law) -> None:
    """Rates a thousand times higher, as of another optimizer: the same curve, so the same forecast."""
    steps = np.arange(made.WARMUP, len(DROP), 80)
    losses = made.losses(DROP, steps, 5e-4)
    forecasts = []
    for scale in (1.0, 1000.0):
        found = fit(law, [curve_of("drop", steps, losses, Schedule(rates_T=scale * DROP))], starts=3)
        target = Schedule(rates_T=scale * COSINE)
        forecasts.append(loss(found.law, found.parameters, target, np.array([3000, 8000])))
    np.testing.assert_allclose(forecasts[0], forecasts[1], rtol=1e-4)


def test_outliers_do_not_move_a_fit(three: list[Curve]) -> None:
    spoiled = three[0].loss_R.copy()
    spoiled[40:44] += 2.0
    flat = curve_of("flat", three[0].steps_R, spoiled, three[0].schedule)
    clean, dirty = (fit(MULTI_POWER, [each, *three[1:]], starts=2) for each in (three[0], flat))
    end = np.array([8000])
    values = [loss(MULTI_POWER, f.parameters, Schedule(rates_T=COSINE), end)[0] for f in (clean, dirty)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


@pytest.mark.parametrize("rates", [FLAT, warmed(constant(3000), 0.95 * constant(3000))])
def test_curves_without_annealing_are_refused_with_what_is_needed(rates: Floats) -> None:
    with pytest.raises(InputError, match=r"never falls.*at least 5 losses at rates below 90%"):
        fit(MULTI_POWER, [curve("flat", rates)])


def test_a_warmup_alone_is_refused() -> None:
    steps = np.arange(1, made.WARMUP)
    with pytest.raises(InputError, match="has 1 losses after the warmup; expected at least 20"):
        curve_of("warmup", steps, 9 - 0.01 * steps, Schedule(rates_T=warmed()))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda steps, losses: (steps, np.where(steps == 500, np.nan, losses)), "loss at step 500 is nan"),
        (lambda steps, losses: (steps, np.where(steps == 500, -1.0, losses)), "loss at step 500 is -1"),
        (
            lambda steps, losses: (steps[:19], losses[:19]),
            "has 19 losses after the warmup; expected at least 20",
        ),
        (lambda steps, losses: (steps[::-1], losses[::-1]), "steps do not rise"),
        (lambda steps, losses: (steps + 10**6, losses), "its schedule ends at step 8099"),
    ],
)
def test_bad_curves(spoil: Callable[[Floats, Floats], tuple[Floats, Floats]], said: str) -> None:
    steps = np.arange(100, 8100, 100)
    with pytest.raises(InputError, match=said):
        curve_of("it", *spoil(steps, 3 + 1 / steps), Schedule(rates_T=FLAT))


def test_many_rows_are_means_of_neighbours_up_to_the_last() -> None:
    steps = np.arange(1, 8100)
    binned = curve_of("it", steps, 3 + steps * 1e-4, Schedule(rates_T=FLAT))
    assert len(binned.steps_R) <= MOST_ROWS
    assert binned.steps_R[-1] > 8080
    np.testing.assert_allclose(binned.loss_R, 3 + binned.steps_R * 1e-4, atol=1e-4)


def test_what_forks_of_one_run_share_counts_once(three: list[Curve]) -> None:
    steps = np.arange(100, 6000, 100)
    trunk = made.losses(FLAT, steps, 1e-3)
    low = warmed(constant(3000), 0.1 * constant(5000))
    fork = np.where(steps < 3100, trunk, made.losses(low, steps, 1e-3, seed=4))
    both = [
        curve_of("trunk", steps, trunk, Schedule(rates_T=FLAT)),
        curve_of("fork", steps, fork, Schedule(rates_T=low)),
    ]
    kept = counted_once(both)
    assert [len(each.steps_R) for each in kept] == [59, 29]
    assert kept[1].steps_R[0] == 3100
    assert [len(each.steps_R) for each in counted_once([both[0], both[0]])] == [59, 0]


def test_a_blocks_mean_tells_noise_that_goes_together() -> None:
    random = np.random.default_rng(0)
    alone = 1e-4 * random.standard_normal(4000)
    together = np.repeat(1e-4 * random.standard_normal(40), 100)
    assert long_run_variance([alone]) == pytest.approx(1e-8, rel=0.9)
    assert long_run_variance([together]) > 20 * long_run_variance([alone])


def test_draws_are_as_wide_as_what_curves_leave_open(three: list[Curve]) -> None:
    ends = []
    for curves in (three, three[2:]):
        found = fit(MULTI_POWER, curves, starts=2)
        drawn = bootstrap(found, draws=12)
        assert drawn.tolist() == bootstrap(found, draws=12).tolist()
        gaps = curve("cosine", COSINE).gaps
        ends.append([MULTI_POWER.evaluate(found.coordinates.values(t)[0], gaps)[0][-1] for t in drawn])
    assert np.std(ends[0]) < np.std(ends[1])
    assert np.std(ends[0]) < 1e-3


def test_curves_are_left_out_one_at_a_time_and_of_one_its_end(three: list[Curve]) -> None:
    errors = held_out(fit(MULTI_POWER, three, starts=2))
    assert [each.name for each in errors] == ["flat", "cosine", "drop"]
    assert all(each.whole and abs(each.error) < 2e-3 for each in errors)
    (alone,) = held_out(fit(MULTI_POWER, three[2:], starts=2))
    assert (alone.name, alone.whole) == ("drop", False)
    assert abs(alone.error) < 2e-3
