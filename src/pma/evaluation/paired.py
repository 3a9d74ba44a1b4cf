"""Two models on the same documents: the difference of their means, and how sure it is.

Documents are the unit of chance: tokens of one document are not independent. Means are over tokens (or
items), so a mean is a ratio of sums over documents; its error comes from the documents' residuals (the
linearised ratio estimator).
"""

# D documents; value_D: a document's summed nats (or right answers), count_D: its tokens (or items)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.errors import InputError

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its standard error and 95% interval (Student's t over documents)."""

    value: float
    standard_error: float
    low: float
    high: float


def mean_estimate(value_D: ArrayLike, count_D: ArrayLike) -> Estimate:
    """Σ value / Σ count, with its error over documents."""
    values, counts = np.asarray(value_D, dtype=np.float64), np.asarray(count_D, dtype=np.float64)
    ratio = values.sum() / counts.sum()
    residuals = (values - ratio * counts) / counts.mean()
    return _interval(float(ratio), residuals)


def paired_difference(value_a_D: ArrayLike, value_b_D: ArrayLike, count_D: ArrayLike) -> Estimate:
    """Mean of a minus mean of b, over the same documents with the same counts."""
    difference = np.asarray(value_a_D, dtype=np.float64) - np.asarray(value_b_D, dtype=np.float64)
    return mean_estimate(difference, count_D)


def stratified_mean(value_SI: Sequence[ArrayLike], weight_S: ArrayLike) -> Estimate:
    """The weighted mean of the means of several sets of items (S sets, each with its own I), whose errors are
    independent; degrees of freedom by Welch and Satterthwaite. Weights need not sum to one.
    """
    weights = np.asarray(weight_S, dtype=np.float64) / np.sum(weight_S)
    used = [(w, np.asarray(v, dtype=np.float64)) for w, v in zip(weights, value_SI, strict=True) if w > 0]
    if any(len(values) < 2 for _, values in used):
        raise InputError("a standard error needs at least two items of each task")
    value = sum(weight * values.mean() for weight, values in used)
    variances = np.array([weight**2 * values.var(ddof=1) / len(values) for weight, values in used])
    error = float(np.sqrt(variances.sum()))
    free = sum(v**2 / (len(values) - 1) for v, (_, values) in zip(variances, used, strict=True))
    return _with_interval(float(value), error, variances.sum() ** 2 / free if free else 1.0)


def gain_recovered(
    last_D: ArrayLike, merge_D: ArrayLike, annealed_D: ArrayLike, count_D: ArrayLike
) -> Estimate | None:
    """(last - merge) / (last - annealed) of mean losses.

    None unless annealing lowered the loss beyond its error: without a gain there is none to recover.
    """
    last, merge, annealed = (np.asarray(x, dtype=np.float64) for x in (last_D, merge_D, annealed_D))
    denominator = paired_difference(last, annealed, count_D)
    if denominator.low <= 0:
        return None
    gained, possible = last - merge, last - annealed
    share = float(gained.sum() / possible.sum())
    return _interval(share, (gained - share * possible) / possible.mean())


def _interval(value: float, residuals_D: Values) -> Estimate:
    documents = len(residuals_D)
    if documents < 2:
        raise InputError("a standard error needs at least two held-out documents")
    error = float(residuals_D.std(ddof=1) / np.sqrt(documents))
    return _with_interval(value, error, documents - 1)


def _with_interval(value: float, error: float, degrees_of_freedom: float) -> Estimate:
    from scipy.special import stdtrit

    reach = float(stdtrit(degrees_of_freedom, 0.975)) * error
    return Estimate(value=value, standard_error=error, low=value - reach, high=value + reach)


def by_document(document_of: ArrayLike, values: ArrayLike, documents: int) -> tuple[Values, Values]:
    """Sums and counts of per-item `values` over the documents they come from, shapes (D,) and (D,)."""
    index = np.asarray(document_of, dtype=np.int64)
    sums: Values = np.bincount(index, np.asarray(values, dtype=np.float64), documents).astype(np.float64)
    counts: Values = np.bincount(index, minlength=documents).astype(np.float64)
    return sums, counts
