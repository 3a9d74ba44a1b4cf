import numpy as np
import pytest
from numpy.typing import NDArray

from pma.forecast.gaps import compress
from pma.forecast.laws import LAWS, Law, loss
from pma.forecast.schedules import Schedule

from . import curves as made
from .curves import constant, half_cosine, line, warmed

SCHEDULES = {
    "constant": warmed(constant(200)),
    "linear to zero": warmed(constant(60), line(120, 0.0)),
    "cosine": warmed(half_cosine(200, 0.1)),
    "drop and back": warmed(constant(60), 0.3 * constant(60), 0.9 * constant(60)),
    "zero and back": warmed(constant(60), 0.0 * constant(40), 0.5 * constant(60)),
    "no warmup": np.full(200, made.PEAK),
}
DIRECT = {
    "multi-power": (made.MULTI_POWER, made.multi_power_loss),
    "tissue": (made.TISSUE, made.tissue_loss),
}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("rates", SCHEDULES.values(), ids=SCHEDULES)
def test_a_law_is_its_formula_summed_directly(name: str, rates: NDArray[np.float64]) -> None:
    parameters, direct = DIRECT[name]
    schedule = Schedule(rates_T=rates)
    steps = np.array([1, 2, 50, 101, 133, 160, len(rates) - 2, len(rates) - 1])
    found = loss(LAWS[name], parameters, schedule, steps)
    expected = [direct(rates, int(step), parameters) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)
    if name == "multi-power":  # without compression it is the sum itself
        law = LAWS[name]
        exact = law.evaluate(law.vector(parameters), compress(schedule, steps, nearest_steps=0))[0]
        np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("every", [7, 128, 5000])
@pytest.mark.parametrize("decay", [half_cosine(20_000, 0.0), line(4000, 0.0), np.sqrt(line(9000, 0.0))])
def test_compressed_sums_are_far_closer_than_a_fit(every: int, decay: NDArray[np.float64]) -> None:
    """Wherever the rows lie; real curves are followed to 1e-3."""
    schedule = Schedule(rates_T=warmed(constant(3000), decay))
    steps = np.append(np.arange(120, schedule.last_step, every), schedule.last_step)
    law = LAWS["multi-power"]
    values_P = law.vector(made.MULTI_POWER)
    gaps, exact = compress(schedule, steps), compress(schedule, steps, nearest_steps=0)
    np.testing.assert_allclose(
        law.evaluate(values_P, gaps)[0], law.evaluate(values_P, exact)[0], rtol=0, atol=3e-5
    )
    assert every < 128 or len(gaps.gap_J) < len(exact.gap_J) / 3


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_derivatives_are_those_of_the_law(law: Law) -> None:
    parameters, _ = DIRECT[law.name]
    schedule = Schedule(rates_T=SCHEDULES["cosine"])
    gaps = compress(schedule, np.array([110, 200, 299]))
    values_P = law.vector(parameters)
    _, jacobian_RP = law.evaluate(values_P, gaps)
    for index, name in enumerate(law.parameters):
        nudge = np.zeros_like(values_P)
        nudge[index] = 1e-6 * values_P[index]
        above, below = law.evaluate(values_P + nudge, gaps)[0], law.evaluate(values_P - nudge, gaps)[0]
        slope = (above - below) / (2 * nudge[index])
        np.testing.assert_allclose(jacobian_RP[:, index], slope, rtol=1e-4, atol=1e-9, err_msg=name)


def test_at_a_constant_rate_without_warmup_there_is_no_annealing_term() -> None:
    steps = np.array([10, 199])
    for law in LAWS.values():
        parameters = dict(DIRECT[law.name][0])
        schedule = Schedule(rates_T=SCHEDULES["no warmup"])
        before = loss(law, parameters, schedule, steps)
        for name in law.of_annealing:
            parameters[name] *= 0.5
        assert loss(law, parameters, schedule, steps).tolist() == before.tolist()


def test_the_warmup_is_in_the_sum() -> None:
    """Left out, the multi-power law is off by nearly B η: the trap."""
    warm, cold = warmed(constant(30_000)), np.full(30_100, made.PEAK)
    steps = np.array([30_000])
    law = LAWS["multi-power"]
    with_it, without = (loss(law, made.MULTI_POWER, Schedule(rates_T=r), steps)[0] for r in (warm, cold))
    assert 0.09 < with_it - without < made.MULTI_POWER["B"] * made.PEAK
