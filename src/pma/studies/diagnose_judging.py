"""Predictions of windows' gains that leave out whole groups of runs, beside simpler ones, and how good all
are.
"""

# W windows, F features, B draws of runs

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.diagnosis.calibrating import fitted
from pma.diagnosis.evidence import Evidence
from pma.diagnosis.prediction import noise_and_cost

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = Sequence[Mapping[str, Any]]

#: what is left out together
GROUPINGS = ("size", "architecture", "rate")
DIAGNOSIS, NO_GRADIENT = "diagnosis", "diagnosis without gradient norms"
RATE_AND_STAGE, ALL_BUT_WEIGHTS = "learning rate and stage", "learning rate, stage and window"
DRAWS = 500
_RIDGE = 1e-2


def judged(rows: Rows) -> dict[str, Any]:
    """Predictions by predictor and grouping, how good they are with intervals over runs, and the constants
    fitted to all.
    """
    windows = [Evidence(**row["evidence"]) for row in rows]
    gain_W = np.array([row["gain"] for row in rows])
    predictors: dict[str, Callable[[Bools, Bools], Floats]] = {
        DIAGNOSIS: lambda train_W, test_W: _diagnosed(windows, gain_W, train_W, test_W, gradient=True),
        NO_GRADIENT: lambda train_W, test_W: _diagnosed(windows, gain_W, train_W, test_W, gradient=False),
        RATE_AND_STAGE: lambda train_W, test_W: _regressed(
            _features(rows, window=False), gain_W, train_W, test_W
        ),
        ALL_BUT_WEIGHTS: lambda train_W, test_W: _regressed(
            _features(rows, window=True), gain_W, train_W, test_W
        ),
    }
    predicted = {
        name: {grouping: _left_out(rows, grouping, predictor) for grouping in GROUPINGS}
        for name, predictor in predictors.items()
    }
    return {
        "negatives": float((gain_W < 0).mean()),
        "predicted": {
            name: {grouping: [float(f"{v:.5g}") for v in values] for grouping, values in by.items()}
            for name, by in predicted.items()
        },
        "figures": {grouping: _figures(rows, gain_W, predicted, grouping) for grouping in GROUPINGS},
        "constants": {
            "with_gradient": _constants(windows, gain_W, gradient=True),
            "without_gradient": _constants(windows, gain_W, gradient=False),
        },
    }


def _constants(windows: Sequence[Evidence], gain_W: Floats, *, gradient: bool) -> dict[str, float]:
    found = fitted(windows, gain_W.tolist(), gradient=gradient)
    return {name: float(f"{value:.5g}") for name, value in vars(found).items()}


def _left_out(rows: Rows, grouping: str, predictor: Callable[[Bools, Bools], Floats]) -> Floats:
    """Each window predicted by what was fitted to runs of other groups."""
    group_W = np.array([str(row[grouping]) for row in rows])
    found_W = np.full(len(rows), np.nan)
    for group in np.unique(group_W):
        test_W = group_W == group
        found_W[test_W] = predictor(~test_W, test_W)
    return found_W


def _diagnosed(
    windows: Sequence[Evidence], gain_W: Floats, train_W: Bools, test_W: Bools, *, gradient: bool
) -> Floats:
    train = np.flatnonzero(train_W).tolist()
    constants = fitted([windows[w] for w in train], gain_W[train].tolist(), gradient=gradient)
    known = [windows[w] for w in np.flatnonzero(test_W).tolist()]
    if not gradient:
        known = [Evidence(**{**vars(found), "gradient": None}) for found in known]
    noise_W, cost_W = noise_and_cost(known, constants)
    return noise_W - cost_W


def _features(rows: Rows, *, window: bool) -> Floats:
    """Logarithms of what a schedule tells, their squares and products."""
    rate_W = np.array([row["rate"] * max(row["evidence"]["rate_share"], 1e-2) for row in rows])
    columns = [np.log(rate_W), np.log([row["step"] for row in rows])]
    if window:
        columns.append(np.log([row["last"] for row in rows]))
        columns.append(np.log([row["every"] * (row["last"] - 1) for row in rows]))
    plain_WF = np.column_stack(columns)
    plain_WF = (plain_WF - plain_WF.mean(axis=0)) / np.maximum(plain_WF.std(axis=0), 1e-12)
    first, second = np.triu_indices(plain_WF.shape[1])
    return np.column_stack((np.ones(len(rows)), plain_WF, plain_WF[:, first] * plain_WF[:, second]))


def _regressed(features_WF: Floats, gain_W: Floats, train_W: Bools, test_W: Bools) -> Floats:
    x = features_WF[train_W]
    solved = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ gain_W[train_W])
    return np.asarray(features_WF[test_W] @ solved, np.float64)


def _figures(
    rows: Rows, gain_W: Floats, predicted: Mapping[str, Mapping[str, Floats]], grouping: str
) -> dict[str, Any]:
    run_W = np.array([row["run"] for row in rows])
    figures: dict[str, Any] = {}
    better_W = gain_W > 0
    samples = _samples(run_W)
    own = predicted[DIAGNOSIS][grouping]
    for name, by in predicted.items():
        value_W = by[grouping]
        regret_P = regrets(rows, value_W)
        figures[name] = {
            "auroc": _with_interval(
                auroc(value_W, better_W), [auroc(value_W[s], better_W[s]) for s in samples]
            ),
            "auroc_lead": _with_interval(
                _difference(auroc(own, better_W), auroc(value_W, better_W)),
                [_difference(auroc(own[s], better_W[s]), auroc(value_W[s], better_W[s])) for s in samples],
            ),
            "mean_absolute_error": float(np.abs(value_W - gain_W).mean()),
            "regret_median": float(np.median(list(regret_P.values()))),
            "regret_mean": float(np.mean(list(regret_P.values()))),
            "regret_most": float(np.max(list(regret_P.values()))),
        }
    return figures


def _samples(run_W: NDArray[np.str_]) -> list[NDArray[np.int64]]:
    """Windows of as many runs, drawn with replacement: runs are the unit of chance."""
    random = np.random.default_rng(0)
    by_run = [np.flatnonzero(run_W == run) for run in np.unique(run_W)]
    drawn = random.integers(len(by_run), size=(DRAWS, len(by_run)))
    return [np.concatenate([by_run[number] for number in row]) for row in drawn]


def auroc(value_W: Floats, better_W: Bools) -> float | None:
    """How often a window that beats last has the higher value than one that does not; None without both."""
    from scipy.stats import rankdata

    above, below = int(better_W.sum()), int((~better_W).sum())
    if not above or not below:
        return None
    ranks_W = rankdata(value_W)
    return float((ranks_W[better_W].sum() - above * (above + 1) / 2) / (above * below))


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _with_interval(value: float | None, drawn: Sequence[float | None]) -> dict[str, float | None]:
    known = [each for each in drawn if each is not None]
    if value is None or len(known) < DRAWS // 2:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(known, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def regrets(rows: Rows, value_W: Floats) -> dict[int, float]:
    """At each place, what the window with the highest predicted gain (none, where no gain is predicted)
    gained less than the best one tried.
    """
    places: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault(row["place"], []).append(number)
    found = {}
    for place, mine in places.items():
        gains = np.array([0.0, *(rows[n]["gain"] for n in mine)])
        found[place] = float(gains.max() - gains[int(np.argmax([0.0, *value_W[mine]]))])
    return found
