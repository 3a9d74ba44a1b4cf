"""What the study of forecasts says: errors with intervals over runs, against simple rules; coverage."""

# C cases; a run's cases are not independent, so runs are drawn

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.studies.forecast_baselines import ASKED, NAMES
from pma.studies.telling import Finding, Table, Told, Verdict, sign_verdict

GROUP, FAMILY, SIZE = "size and rate", "architecture", "size"
OWN_FORKS, PROBED = "its own earlier decays", "a short probe"
GOAL, GOAL_RATIO = 0.015, 0.5
_COVERAGE = {0.80: (0.70, 0.90), 0.95: (0.88, 1.0)}
_DRAWS = 2_000

Floats = NDArray[np.float64]


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    cases = results["cases"]
    errors = _errors(cases, results["merges"][GROUP])
    return Told(
        set_up=_set_up(results),
        tables=[_table(results), _by_group(results)],
        findings=[_accurate(cases, errors), *_better(results, errors), *_covered(results), _own(results)],
        more="runs of a size at which the gain is a tenth of what it is here, other data and optimizers, "
        "and decays that are longer than the run before them.",
        notes=[*_shapes(results), *_refused(results)],
    )


def _set_up(results: dict[str, Any]) -> str:
    cases = results["cases"]
    runs, groups = ({case[key] for case in cases} for key in ("run", "group"))
    lengths = " and ".join(str(steps) for steps in sorted({case["steps"] for case in cases}))
    starts = ", ".join(f"{step:,}" for step in sorted({case["from_step"] for case in cases}))
    return (
        f"{len(runs)} runs at a constant rate ({len(groups)} pairs of a size and a rate) were annealed "
        f"from steps {starts}, by cosines of {lengths} steps: {len(cases)} decays. Each is forecast from the "
        "losses of merges and raw checkpoints up to its start, as `pma forecast RUN` does, with a "
        "calibration that has seen no run of its group: no run of that size and rate, of that architecture, "
        "or of that size. Errors are of the held-out loss, nats a token; 95% intervals draw whole runs. The "
        "matched rule, last, knows what the others do not: decays of other runs from the very same step."
    )


def _errors(cases: Sequence[dict[str, Any]], rows: Sequence[Any]) -> Floats:
    """Forecast less truth; NaN where there is no forecast. Rows are losses, or forecasts."""
    losses = [row["loss"] if isinstance(row, dict) else row for row in rows]
    pairs = zip(losses, cases, strict=True)
    return np.array([np.nan if loss is None else loss - case["loss"] for loss, case in pairs], dtype=float)


def _drawn(cases: Sequence[dict[str, Any]]) -> Floats:
    """How often each case counts in each draw of whole runs, shape (draws, C)."""
    runs = sorted({case["run"] for case in cases})
    place = np.array([runs.index(case["run"]) for case in cases])
    random = np.random.default_rng(0)
    counts = random.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=_DRAWS)
    drawn: Floats = counts[:, place].astype(float)
    return drawn


def _mean(cases: Sequence[dict[str, Any]], values: Floats) -> tuple[float, float, float]:
    """The mean over cases that have a value, with its 95% interval."""
    known = np.isfinite(values)
    if not known.any():
        return float("nan"), float("nan"), float("nan")
    weight = _drawn(cases)[:, known]
    means = weight @ values[known] / np.maximum(weight.sum(axis=1), 1e-9)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values[known].mean()), float(low), float(high)


def _ratio(cases: Sequence[dict[str, Any]], own: Floats, other: Floats) -> tuple[float, float, float]:
    """Mean absolute error of `own` over that of `other`, on the cases that both have."""
    known = np.isfinite(own) & np.isfinite(other)
    if not known.any():
        return float("nan"), float("nan"), float("nan")
    weight = _drawn(cases)[:, known]
    ratios = (weight @ abs(own[known])) / np.maximum(weight @ abs(other[known]), 1e-12)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(abs(own[known]).mean() / abs(other[known]).mean()), float(low), float(high)


def _row(cases: Sequence[dict[str, Any]], name: str, errors: Floats, own: Floats) -> list[str]:
    known = np.isfinite(errors)
    value, low, high = _mean(cases, abs(errors))
    middle, ratio = (np.median(abs(errors[known])) if known.any() else np.nan), _ratio(cases, own, errors)
    return [name, str(int(known.sum())), _shown(value, low, high), _number(middle), _shown(*ratio, digits=2)]


def _table(results: dict[str, Any]) -> Table:
    cases = results["cases"]
    own = _errors(cases, results["merges"][GROUP])
    rows = []
    for name, made in results["merges"].items():
        rows.append(_row(cases, f"**merges**, {name} left out", _errors(cases, made), own))
    for name, made in results["own"].items():
        rows.append(_row(cases, f"**merges and {name}**", _errors(cases, made), own))
    for name in NAMES:
        rows.append(_row(cases, name, _errors(cases, results["rules"].get(name, [])), own))
    columns = ["forecast", "decays", "mean absolute error", "median", "merges' error ÷ this"]
    return Table(columns=columns, rows=rows)


def _by_group(results: dict[str, Any]) -> Table:
    cases, errors = results["cases"], _errors(results["cases"], results["merges"][GROUP])
    rows = []
    for group in sorted({case["group"] for case in cases}):
        own = np.array([case["group"] == group for case in cases]) & np.isfinite(errors)
        if own.any():
            gain = np.mean([results["merges"][GROUP][i]["gain"] for i in np.flatnonzero(own)])
            mean, bias = abs(errors[own]).mean(), errors[own].mean()
            rows.append(
                [group, str(int(own.sum())), _number(gain, 3), _number(mean), _number(bias, signed=True)]
            )
    title = "The first row by group that was left out:"
    columns = ["group", "decays", "gain forecast", "mean absolute error", "mean error"]
    return Table(title=title, columns=columns, rows=rows)


def _accurate(cases: Sequence[dict[str, Any]], errors: Floats) -> Finding:
    value, low, high = _mean(cases, abs(errors))
    return Finding(
        claim="the final loss of a run none of whose decays is known is forecast within "
        f"{GOAL:g} nats in the mean",
        verdict=_at_most(low, high, GOAL),
        evidence=f"Mean absolute error {_shown(value, low, high)}.",
    )


def _better(results: dict[str, Any], errors: Floats) -> list[Finding]:
    """Than each rule."""
    cases, found = results["cases"], []
    for name in ASKED:
        ratio = _ratio(cases, errors, _errors(cases, results["rules"].get(name, [])))
        found.append(
            Finding(
                claim=f"with at most half the error of: {name}",
                verdict=_at_most(ratio[1], ratio[2], GOAL_RATIO),
                evidence=f"{_shown(*ratio, digits=2)} of it.",
            )
        )
    return found


def coverage(cases: Sequence[dict[str, Any]], rows: Sequence[Any], level: float) -> Floats:
    """1 where the interval holds the loss, 0 where not, NaN where there is none."""
    key = f"interval{round(100 * level)}"
    return np.array(
        [
            np.nan if row is None else float(row[key][0] <= case["loss"] <= row[key][1])
            for row, case in zip(rows, cases, strict=True)
        ],
        dtype=float,
    )


def _covered(results: dict[str, Any]) -> list[Finding]:
    cases, found = results["cases"], []
    for level, (least, most) in _COVERAGE.items():
        value, low, high = _mean(cases, coverage(cases, results["merges"][GROUP], level))
        inside = Verdict.AGREES if least <= value <= most else Verdict.DISAGREES
        found.append(
            Finding(
                claim=f"{level:.0%} intervals hold {least:.0%} to {most:.0%} of the losses",
                verdict=Verdict.CANNOT_TELL if np.isnan(value) else inside,
                evidence=f"{value:.0%} ({low:.0%} to {high:.0%})."
                if not np.isnan(value)
                else "No forecasts.",
            )
        )
    return found


def _own(results: dict[str, Any]) -> Finding:
    """Whether decays of the run itself make it better, on the decays that have them."""
    cases, merges = results["cases"], _errors(results["cases"], results["merges"][GROUP])
    ratios = {name: _ratio(cases, _errors(cases, made), merges) for name, made in results["own"].items()}
    shown = "; ".join(f"{name}: {_shown(*ratio, digits=2)}" for name, ratio in ratios.items())
    low, high = max(r[1] for r in ratios.values()), max(r[2] for r in ratios.values())
    return Finding(
        claim="decays of the run itself make forecasts better",
        verdict=_at_most(low, high, 1.0),
        evidence=f"Error as a share of that without, on the same decays: {shown}.",
    )


def _shapes(results: dict[str, Any]) -> list[str]:
    cases, rows = results["shapes"]["cases"], results["shapes"]["merges"]
    told = []
    for shape in sorted({case["shape"] for case in cases}):
        own = [i for i, case in enumerate(cases) if case["shape"] == shape and rows[i] is not None]
        if own:
            errors = _errors([cases[i] for i in own], [rows[i] for i in own])
            mean, bias = abs(errors).mean(), errors.mean()
            told.append(f"{shape} ({len(own)}): {_number(mean)} (mean error {_number(bias, signed=True)})")
    if not told:
        return []
    return [
        f"Decays of other shapes, forecast by what cosines taught; mean absolute error: {'; '.join(told)}."
    ]


def _refused(results: dict[str, Any]) -> list[str]:
    refused = results["refused"]
    return [f"Not forecast, as merges do not tell: {len(refused)}; such as {refused[0]}."] if refused else []


def _at_most(low: float, high: float, most: float) -> Verdict:
    if np.isnan(low) or np.isnan(high):
        return Verdict.CANNOT_TELL
    return sign_verdict(low - most, high - most, claimed_positive=False)


def _number(value: float, digits: int = 4, *, signed: bool = False) -> str:
    return "" if np.isnan(value) else f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _shown(value: float, low: float, high: float, digits: int = 4) -> str:
    if np.isnan(value):
        return "unknown"
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
