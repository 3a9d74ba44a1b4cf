"""Differences over seeds, with intervals that hold for other seeds and for other documents.

Two models of a seed are compared on the same documents. The mean over seeds has two errors: that of the seeds
(training again would give other models) and that of the documents (the text could be another). They are
added as independent ones; degrees of freedom by Welch and Satterthwaite.
"""

# S seeds, D documents, I items

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.evaluation.evaluate import Evaluation, loss_difference
from pma.evaluation.paired import by_document, mean_estimate

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95% interval, and each seed's value. Of one seed: documents' error alone."""

    value: float
    low: float
    high: float
    standard_error: float
    by_seed: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; JSON has no infinity, so ends that are not known are None."""
        ends = {
            name: end if np.isfinite(end) else None for name, end in (("low", self.low), ("high", self.high))
        }
        error = self.standard_error if np.isfinite(self.standard_error) else None
        return {**asdict(self), **ends, "standard_error": error}


def of_values(value_S: Sequence[float]) -> Interval:
    """Mean of one value a seed, Student's t over seeds. Of one seed the interval is not finite."""
    values = np.asarray(value_S, dtype=np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
    return _interval(values, [(error, len(values) - 1)])


def loss_gain(pairs_S: Sequence[tuple[Evaluation, Evaluation]]) -> Interval:
    """Loss of the first of each pair less that of the second, nats a token: positive where the second is
    better.
    """
    for first, second in pairs_S:
        loss_difference(first, second)  # refuses what cannot be paired
    first = pairs_S[0][0]
    difference_SD = [np.subtract(a.nats, b.nats) for a, b in pairs_S]
    return _paired(difference_SD, first.tokens)


def cloze_gain(pairs_S: Sequence[tuple[Evaluation, Evaluation]]) -> Interval:
    """Cloze accuracy of the second of each pair less that of the first."""
    first = pairs_S[0][0]
    sums_SD, counts_D = [], np.zeros(len(first.nats))
    for a, b in pairs_S:
        right_I = np.array(b.cloze, dtype=float) - np.array(a.cloze, dtype=float)
        sums, counts_D = by_document(a.cloze_documents, right_I, len(a.nats))
        sums_SD.append(sums)
    used = counts_D > 0
    return _paired([sums[used] for sums in sums_SD], counts_D[used])


def score_gain(pairs_S: Sequence[tuple[Any, Any]]) -> Interval:
    """Score on a task (a TaskResult) of the second of each pair less that of the first; items are the
    unit.
    """
    difference_SI = [item_scores(b) - item_scores(a) for a, b in pairs_S]
    return _paired(difference_SI, np.ones(len(difference_SI[0])))


def item_scores(result: Any) -> Values:
    """Each item's score on a task, all parts in order, shape (I,)."""
    return np.concatenate([np.asarray(part.scores[result.metric], dtype=np.float64) for part in result.parts])


def right_answer_gain(pairs_S: Sequence[tuple[Any, Any]]) -> Interval:
    """As `score_gain`, of the mean log-likelihood of the right answer in nats, which small models move on
    first.
    """
    difference_SI = [_right(b) - _right(a) for a, b in pairs_S]
    return _paired(difference_SI, np.ones(len(difference_SI[0])))


def _right(result: Any) -> Values:
    picked = [
        [answers[gold] for answers, gold in zip(part.loglikelihoods, part.gold, strict=True)]
        for part in result.parts
    ]
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in picked])


def series_gain(pairs_S: Sequence[tuple[Values, Values]], block_steps: int) -> Interval:
    """Mean over steps of the first series of each pair less that of the second. Neighbouring steps are not
    independent, so stretches of `block_steps` are the unit.
    """
    difference_ST = [np.subtract(a, b) for a, b in pairs_S]
    starts = np.arange(0, len(difference_ST[0]), block_steps)
    if len(starts) < 2:  # one stretch has no error of its own
        return of_values([float(each.mean()) for each in difference_ST])
    sums = [np.add.reduceat(each, starts) for each in difference_ST]
    return _paired(sums, np.diff([*starts, len(difference_ST[0])]))


def ratio(numerators_S: Sequence[float], denominators_S: Sequence[float]) -> Interval | None:
    """Ratio of means over seeds with a jackknife's interval; None where the denominator's holds zero."""
    below = of_values(denominators_S)
    if below.low <= 0 <= below.high or len(denominators_S) < 2:
        return None
    top, bottom = np.asarray(numerators_S), np.asarray(denominators_S)
    value = float(top.mean() / bottom.mean())
    residual_S = (top - value * bottom) / bottom.mean()
    error = float(residual_S.std(ddof=1) / np.sqrt(len(residual_S)))
    low, high = _reach(value, [(error, len(residual_S) - 1)])
    by_seed = tuple(float(each) for each in top / bottom)
    return Interval(value=value, low=low, high=high, standard_error=error, by_seed=by_seed)


def gain_beyond(
    first_S: Sequence[tuple[Evaluation, Evaluation]],
    second_S: Sequence[tuple[Evaluation, Evaluation]],
    times: float = 1.0,
) -> Interval:
    """`loss_gain` of the first pairs less `times` that of the second, all on the same documents."""
    difference_SD = [
        np.subtract(a.nats, b.nats) - times * np.subtract(c.nats, d.nats)
        for (a, b), (c, d) in zip(first_S, second_S, strict=True)
    ]
    return _paired(difference_SD, first_S[0][0].tokens)


def share(
    gained_S: Sequence[tuple[Evaluation, Evaluation]], possible_S: Sequence[tuple[Evaluation, Evaluation]]
) -> Interval | None:
    """`loss_gain` of the first pairs as a share of that of the second. With (last, merge) and (last,
    annealed) it is the gain recovered. None unless the interval of what was possible lies above zero.
    """
    gained, possible = loss_gain(gained_S), loss_gain(possible_S)
    if possible.low <= 0 or not all(possible.by_seed):
        return None
    value = gained.value / possible.value
    # a ratio's error is that of what is left when the ratio is taken off, in units of the denominator
    left = gain_beyond(gained_S, possible_S, value)
    return Interval(
        value=value,
        low=value + left.low / possible.value,
        high=value + left.high / possible.value,
        standard_error=left.standard_error / possible.value,
        by_seed=tuple(a / b for a, b in zip(gained.by_seed, possible.by_seed, strict=True)),
    )


def _paired(difference_SD: Sequence[ArrayLike], count_D: ArrayLike) -> Interval:
    """Of summed differences by seed and document, and counts by document."""
    summed_SD, counts = np.asarray(difference_SD, dtype=np.float64), np.asarray(count_D, dtype=np.float64)
    value_S = summed_SD.sum(axis=1) / counts.sum()
    documents = mean_estimate(summed_SD.mean(axis=0), counts)
    errors = [(documents.standard_error, len(counts) - 1)]
    if len(value_S) > 1:
        errors.append((float(value_S.std(ddof=1) / np.sqrt(len(value_S))), len(value_S) - 1))
    return _interval(value_S, errors)


def _interval(value_S: Values, errors: Sequence[tuple[float, int]]) -> Interval:
    value = float(value_S.mean())
    low, high = _reach(value, errors)
    return Interval(
        value=value,
        low=low,
        high=high,
        standard_error=float(np.sqrt(sum(error**2 for error, _ in errors))),
        by_seed=tuple(float(each) for each in value_S),
    )


def _reach(value: float, errors: Sequence[tuple[float, int]]) -> tuple[float, float]:
    from scipy.special import stdtrit

    variance = sum(error**2 for error, _ in errors)
    if not np.isfinite(variance):
        return float("-inf"), float("inf")
    shares = sum(error**4 / free for error, free in errors if free)
    reach = float(stdtrit(variance**2 / shares, 0.975) * np.sqrt(variance)) if shares else 0.0
    return value - reach, value + reach


def shown(interval: Interval | dict[str, Any], digits: int = 3, *, signed: bool = True) -> str:
    """`+0.049 (+0.045 to +0.053)`, from an interval or its JSON; `+0.049 (one seed)` where the ends are not
    known.
    """
    told = interval.to_json() if isinstance(interval, Interval) else interval
    sign = "+" if signed else ""
    if told["low"] is None:
        return f"{told['value']:{sign}.{digits}f} (one seed)".replace("-", "−")
    value, low, high = (f"{told[key]:{sign}.{digits}f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
