"""What others would forecast of a decay: simple rules, each with everything that it may know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pma.errors import InputError
from pma.forecast.calibration import Decay
from pma.forecast.curves import Curve, curve_of
from pma.forecast.fitting import long_run_variance, minimise, problem_of, split
from pma.forecast.gaps import compress
from pma.forecast.laws import MULTI_POWER
from pma.forecast.schedules import Schedule
from pma.formats import hf_trainer
from pma.studies.forecast_cases import Known, Place
from pma.studies.lab import Lab

LAST, MERGE = "last loss", "raw merge loss"
MERGE_OFFSET, LAST_GAIN = "merge + mean offset of other runs", "last − mean gain of other runs"
MATCHED = "merge + mean offset of other runs' forks at the same step"
LAW = "law from the constant curve alone"
NAMES = (LAST, MERGE, MERGE_OFFSET, LAST_GAIN, LAW, MATCHED)
#: what the others are held to; the matched rule needs other runs' forks at the same step
ASKED = NAMES[:-1]
_PUBLISHED_100M, _PUBLISHED_PEAK = (437.9, 2.132, 0.598, 0.655), 3e-4


def last_loss(place: Place) -> float:
    """Of the raw checkpoint where the decay starts."""
    return place.probes[0].loss


def merge_loss(place: Place) -> float:
    """Of the merge over the usual window that ends there."""
    ends = [p for p in place.probes if len(p.steps) > 1 and p.steps[-1] == place.from_step]
    usual = sorted(len(p.steps) for p in ends)
    want = 10 if 10 in usual else usual[len(usual) // 2]
    return next(p.loss for p in ends if len(p.steps) == want)


def simple(known: Sequence[Known]) -> dict[str, list[float | None]]:
    """Forecasts of each rule, in the order of `known`. Other runs: all with another name, same length."""

    def alike(a: Known, b: Known) -> bool:
        return a.place.run != b.place.run and a.decay == b.decay

    def same_step(a: Known, b: Known) -> bool:
        return alike(a, b) and a.place.from_step == b.place.from_step

    return {
        LAST: [last_loss(each.place) for each in known],
        MERGE: [merge_loss(each.place) for each in known],
        MERGE_OFFSET: _shifted(known, merge_loss, alike),
        LAST_GAIN: _shifted(known, last_loss, alike),
        MATCHED: _shifted(known, merge_loss, same_step),
    }


def _shifted(
    known: Sequence[Known], base: Callable[[Place], float], among: Callable[[Known, Known], bool]
) -> list[float | None]:
    """`base` and the mean of what the decay gave beyond it, over the others."""
    found: list[float | None] = []
    for each in known:
        beyond = [other.loss - base(other.place) for other in known if among(each, other)]
        found.append(base(each.place) + float(np.mean(beyond)) if beyond else None)
    return found


def of_law(lab: Lab, known: Sequence[Known]) -> list[float | None]:
    """The multi-power law, fitted to the training losses up to each fork and shifted to the held-out text by
    what raw checkpoints have there. A constant curve has no annealing term; it is that of the published 100M
    run, in units of the highest rate.
    """
    shapes = sorted({each.decay for each in known}, key=lambda decay: (decay.shape, decay.steps))
    forks = list({(each.place.run, each.place.from_step): each.place for each in known}.values())
    arguments = [(place.trunk.checkpoint(lab.home, place.from_step), place, shapes) for place in forks]
    forecasts = {
        (place.run, place.from_step, decay): loss
        for place, losses in zip(forks, lab.map(law_forecasts, arguments), strict=True)
        for decay, loss in zip(shapes, losses, strict=True)
    }
    return [forecasts[each.place.run, each.place.from_step, each.decay] for each in known]


def law_forecasts(checkpoint: Path, place: Place, shapes: Sequence[Decay]) -> list[float | None]:
    """Of each decay from one fork; None where the curve has too few losses."""
    log = hf_trainer.read_meta(checkpoint).log
    peak = max(rate for _, rate in log.learning_rates)
    warm = min(step for step, rate in log.learning_rates if rate == peak)
    schedule = Schedule(rates_T=np.full(place.from_step + 1, peak))
    losses = [(step, loss) for step, loss in log.losses if step > warm]
    try:
        curve = curve_of("", [step for step, _ in losses], [loss for _, loss in losses], schedule)
    except InputError:
        return [None] * len(shapes)
    values_P = _with_published_annealing(_fitted(curve), peak)
    raw = sorted((p.steps[0], p.loss) for p in place.probes if len(p.steps) == 1)
    at_R, held_out_R = np.array([step for step, _ in raw]), np.array([loss for _, loss in raw])
    offset = float(np.mean(held_out_R - MULTI_POWER.evaluate(values_P, compress(schedule, at_R))[0]))
    found: list[float | None] = []
    for decay in shapes:
        annealed = schedule.annealed(decay.shape, decay.steps)
        end = compress(annealed, np.array([annealed.last_step]))
        found.append(float(MULTI_POWER.evaluate(values_P, end)[0][0]) + offset)
    return found


def _with_published_annealing(values_P: NDArray[np.float64], peak: float) -> NDArray[np.float64]:
    """L0, A and α as fitted; B, C, β, γ of arXiv 2503.12811 (100M), whose highest rate was 3e-4."""
    units = _PUBLISHED_PEAK / peak
    b, c, beta, gamma = _PUBLISHED_100M
    published = {"B": b * units, "C": c * units ** (1 - gamma), "beta": beta, "gamma": gamma}
    named = dict(zip(MULTI_POWER.parameters, values_P, strict=True)) | published
    return np.array([named[name] for name in MULTI_POWER.parameters])


def _fitted(curve: Curve) -> NDArray[np.float64]:
    """As `pma.forecast.fitting.fit`, which would refuse a curve without any annealing."""
    problem = problem_of(MULTI_POWER, [curve])
    centre_P = problem.coordinates.centre_P
    start_P = problem.coordinates.starts(np.random.default_rng(0), 1)[0]
    free = minimise(problem, start_P, 0.0, centre_P)
    weight = long_run_variance(split(problem, problem.residuals(free.x)))
    found = minimise(problem, start_P, weight, centre_P)
    values_P: NDArray[np.float64] = problem.coordinates.values(found.x)[0]
    return values_P
