from pathlib import Path

import numpy as np
import pytest

from pma.forecast import Learned, forecast, learn
from pma.forecast.schedules import Schedule

from . import curves as made
from .curves import constant, half_cosine, line, warmed
from .test_fitting import COSINE, DROP, FLAT, curve


@pytest.fixture(scope="module")
def learned() -> Learned:
    return learn([curve("flat", FLAT, seed=1), curve("drop", DROP, seed=3)], draws=12)


def test_the_truth_lies_in_the_intervals_and_they_nest(learned: Learned) -> None:
    target = warmed(constant(5000), line(1500, 0.2))
    steps = np.array([200, 3000, 5099, 5800, len(target) - 1])
    found = forecast(learned, Schedule(rates_T=target), steps)
    truth = made.losses(target, steps)
    (low80, high80), (low95, high95) = found.intervals[0.80], found.intervals[0.95]
    assert ((low95 < low80) & (low80 < found.loss_R) & (found.loss_R < high80) & (high80 < high95)).all()
    assert ((low95 < truth) & (truth < high95)).all()
    # a law's own error is at least 0.2% of the loss, however well its curves are fitted
    assert (found.error_R >= 0.002).all()
    flat = made.losses(warmed(constant(6500)), steps[-1:])[0]
    assert found.constant_R[-1] == pytest.approx(flat, abs=3e-3)
    assert found.gain == pytest.approx(flat - truth[-1], abs=6e-3)
    assert found.told
    assert found.widened == ()


def test_going_beyond_what_the_curves_show_is_said_and_widens(learned: Learned) -> None:
    within = forecast(learned, Schedule(rates_T=warmed(constant(3000), line(2500, 0.2))), np.array([5599]))
    longer = forecast(
        learned, Schedule(rates_T=warmed(constant(3000), line(12_000, 0.0))), np.array([15_099])
    )
    assert within.widened == ()
    total, decay, fall = longer.widened
    assert "a sum of rates 1.14 times" in total[0]
    assert "a decay 4.05 times as long" in decay[0]
    assert decay[1] == pytest.approx(2.0, rel=0.01)
    assert "a fall of the rate 1.25 times as deep" in fall[0]
    assert longer.error_R[0] > 1.5 * within.error_R[0]
    further = forecast(
        learned, Schedule(rates_T=warmed(constant(40_000), line(1000, 0.2))), np.array([41_099])
    )
    assert "a sum of rates 5" in further.widened[0][0]


def test_one_phase_alone_is_said_and_widens() -> None:
    alone = learn([curve("cosine", COSINE, seed=2)], draws=8)
    found = forecast(alone, Schedule(rates_T=warmed(constant(3000), line(2500, 0.2))), np.array([5599]))
    why, factor = found.widened[0]
    assert "no curve has a fifth of its losses at its peak rate" in why
    assert factor == 2.0
    assert found.error_R[0] > 0.004


def test_a_decay_too_short_to_be_told_from_none_is_not_told(learned: Learned) -> None:
    short = warmed(constant(5000), line(2, 0.9))
    found = forecast(learned, Schedule(rates_T=short), np.array([len(short) - 1]))
    assert not found.told


def test_parameters_that_curves_leave_open_are_named(learned: Learned) -> None:
    assert "C" in learned.open_parameters
    assert "L0" not in learned.open_parameters
    low, high = learned.parameter_intervals["alpha"]
    assert low < made.MULTI_POWER["alpha"] < high or low == pytest.approx(0.5, abs=0.1)


# ---- real curves, where they are ----

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "loss_curves"
SIZES = sorted(path.name for path in FOLDER.glob("*") if path.is_dir())
FITTED = ("constant_24000", "constant_72000", "cosine_24000", "wsdcon_3", "wsdcon_9", "wsdcon_18")
_OF_100M = (2.651, 0.601, 0.453, 437.9, 2.132, 0.598, 0.655)
PUBLISHED = {"25M": made.MULTI_POWER, "100M": dict(zip(made.MULTI_POWER, _OF_100M, strict=True))}


@pytest.mark.skipif(not SIZES, reason=f"no loss curves in {FOLDER}")
@pytest.mark.parametrize("size", SIZES or ["none"])
def test_real_decays_are_forecast_from_other_schedules(size: str) -> None:
    from pma.forecast.fitting import fit
    from pma.forecast.laws import MULTI_POWER, loss
    from pma.forecast.tables import read_table

    tables = {path.stem: read_table(path) for path in (FOLDER / size).glob("*.csv")}
    curves = {name: table.curve(table.schedule(None)) for name, table in tables.items()}
    found = fit(MULTI_POWER, [curves[name] for name in FITTED if name in curves], starts=2)
    for name, mean_error, end_error in (
        ("wsd_20000_24000", 0.004, 0.012),
        ("wsdld_20000_24000", 0.004, 0.012),
        ("cosine_72000", 0.015, 0.020),
    ):
        each = curves[name]
        errors = loss(MULTI_POWER, found.parameters, each.schedule, each.steps_R) - each.loss_R
        assert np.abs(errors).mean() <= mean_error, name
        assert abs(errors[-1]) <= end_error, name
    if size in PUBLISHED:  # the published parameters, with the warmup that the files leave out
        each = curves["wsd_20000_24000"]
        errors = loss(MULTI_POWER, PUBLISHED[size], each.schedule, each.steps_R) - each.loss_R
        assert np.abs(errors).mean() < 0.006


def test_schedules_of_the_fixtures_are_what_they_say() -> None:
    assert COSINE[made.WARMUP] == made.PEAK
    assert half_cosine(10, 0.1)[0] == 1.0
