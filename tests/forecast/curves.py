"""Curves made by direct sums of the laws' formulas, O(T²) and without any of the package's code."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: like those published for 25M parameters
MULTI_POWER = {"L0": 3.04, "A": 0.525, "alpha": 0.508, "B": 363.8, "C": 2.066, "beta": 0.583, "gamma": 0.641}
TISSUE = {"L0": 3.03, "A": 0.53, "alpha": 0.49, "C": 1.5, "lambda": 0.99}
PEAK = 3e-4
WARMUP = 100

Floats = NDArray[np.float64]


def warmed(*parts: Floats) -> Floats:
    """The rate of every step from 0 on: a linear warmup, then `parts` as shares of the peak."""
    return PEAK * np.concatenate((np.arange(WARMUP) / WARMUP, *parts))


def constant(steps: int) -> Floats:
    return np.ones(steps)


def line(steps: int, end: float) -> Floats:
    return 1 - (1 - end) * np.arange(1, steps + 1) / steps


def half_cosine(steps: int, end: float) -> Floats:
    return end + (1 - end) * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))


def multi_power_loss(rates: Floats, step: int, p: dict[str, float] = MULTI_POWER) -> float:
    term = 0.0
    for k in range(1, step + 1):
        gap = rates[k - 1] - rates[k]
        later = rates[k : step + 1].sum()
        if gap != 0 and later > 0 and rates[k] == 0:
            term += gap  # the limit: a rate of 0 has responded in full once the rate is up again
        elif gap != 0 and later > 0:
            term += gap * (1 - (1 + p["C"] * rates[k] ** -p["gamma"] * later) ** -p["beta"])
    return float(p["L0"] + p["A"] * rates[1 : step + 1].sum() ** -p["alpha"] - p["B"] * term)


def tissue_loss(rates: Floats, step: int, p: dict[str, float] = TISSUE) -> float:
    second = sum(
        (rates[k - 1] - rates[k]) * p["lambda"] ** (i - k)
        for i in range(1, step + 1)
        for k in range(1, i + 1)
    )
    return float(p["L0"] + p["A"] * rates[1 : step + 1].sum() ** -p["alpha"] - p["C"] * second)


def losses(rates: Floats, steps: NDArray[np.int64], noise: float = 0.0, seed: int = 0) -> Floats:
    """Losses of the multi-power law with noise; schedules this long are summed with numpy."""
    totals = np.concatenate(([0.0], np.cumsum(rates[1:])))
    changes = np.flatnonzero(np.diff(rates)) + 1
    changes = changes[rates[changes] > 0]
    p, found = MULTI_POWER, []
    for step in steps:
        k = changes[changes <= step]
        response = 1 - (1 + p["C"] * rates[k] ** -p["gamma"] * (totals[step] - totals[k - 1])) ** -p["beta"]
        annealed = p["B"] * float(((rates[k - 1] - rates[k]) * response).sum())
        found.append(p["L0"] + p["A"] * totals[step] ** -p["alpha"] - annealed)
    return np.array(found) + noise * np.random.default_rng(seed).standard_normal(len(steps))


def write_curve(
    path: Path, rates: Floats, every: int = 100, *, noise: float = 5e-4, seed: int = 0, first: int = WARMUP
) -> Path:
    """A CSV of step, lr and loss, as a trainer logs it."""
    steps = np.arange(first, len(rates), every)
    rows = zip(steps, rates[steps], losses(rates, steps, noise, seed), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "step,lr,loss\n"
        + "".join(f"{s},{r!r},{v:.5f}\n" for s, r, v in ((int(s), float(r), v) for s, r, v in rows))
    )
    return path
