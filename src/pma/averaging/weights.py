"""Schemes: from the positions of N checkpoints to N weights that sum to 1, oldest first.

Source: arXiv 2505.12082, eq. 3 (SMA), eq. 4 (EMA), eq. 5 (WMA); differs: weights are computed in fp64 and
normalised.
"""

# N checkpoints, i = 0 (oldest) … N-1 (newest)

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pma.averaging.decay import DECAYS, decay_weights
from pma.errors import UsageError

Weights = NDArray[np.float64]
Scheme = Callable[[Sequence[float]], Weights]

SCHEME_NAMES = (
    "sma, wma, ema:ALPHA, ema-normalized:ALPHA, linear, cosine, 1-sqrt (each decay also as NAME:FLOOR)"
)


def sma(positions: Sequence[float]) -> Weights:
    """Simple moving average: 1/N each."""
    return np.full(len(positions), 1.0 / len(positions))


def wma(positions: Sequence[float]) -> Weights:
    """Weighted moving average: proportional to 1 … N, the newest most."""
    ranks_N = np.arange(1, len(positions) + 1, dtype=np.float64)
    weights_N: Weights = ranks_N / ranks_N.sum()
    return weights_N


def ema(alpha: float) -> Scheme:
    """Exponential moving average as eq. 4 recurses: the oldest checkpoint keeps all the weight the others
    left.
    """
    _check_alpha(alpha)

    def weights(positions: Sequence[float]) -> Weights:
        ages_N = np.arange(len(positions) - 1, -1, -1, dtype=np.float64)
        weights_N = alpha * (1 - alpha) ** ages_N
        weights_N[0] = (1 - alpha) ** ages_N[0]
        return weights_N

    return weights


def ema_normalized(alpha: float) -> Scheme:
    """α(1-α)^(N-i) for every checkpoint, as section 4.2 prints it, divided by its sum."""
    _check_alpha(alpha)

    def weights(positions: Sequence[float]) -> Weights:
        ages_N = np.arange(len(positions) - 1, -1, -1, dtype=np.float64)
        weights_N = (1 - alpha) ** ages_N
        normalized_N: Weights = weights_N / weights_N.sum()
        return normalized_N

    return weights


def given(values: Sequence[float]) -> Weights:
    """Weights the user gives, oldest first. Raises UsageError unless they are finite and sum to 1 within
    1e-6.
    """
    weights_N = np.asarray(values, dtype=np.float64)
    if not np.isfinite(weights_N).all():
        raise UsageError("given weights must be finite numbers that sum to 1")
    if abs(weights_N.sum() - 1) > 1e-6:
        raise UsageError(f"given weights must be numbers that sum to 1; these sum to {weights_N.sum():g}")
    if abs(weights_N.sum() - 1) <= 1e-12:
        return weights_N  # as they are, to the bit: a recorded merge must come out the same again
    normalized_N: Weights = weights_N / weights_N.sum()
    return normalized_N


def scheme(name: str) -> Scheme:
    """The scheme called `name`, such as `sma`, `ema:0.2` or `cosine:0.1`. Raises UsageError for any other."""
    head, separator, tail = name.partition(":")
    if not separator and head in ("sma", "wma"):
        return sma if head == "sma" else wma
    if separator and head in ("ema", "ema-normalized"):
        return (ema if head == "ema" else ema_normalized)(_number(tail, name))
    if head in DECAYS:
        floor = _number(tail, name) if separator else 0.0
        return lambda positions: decay_weights(DECAYS[head], positions, floor=floor)
    raise UsageError(f"scheme {name!r} is not known; there are {SCHEME_NAMES}")


def equal(weights_N: Weights) -> bool:
    """Whether all weights are the same, so that the sum can be divided once instead of scaled N times."""
    return bool((weights_N == weights_N[0]).all())


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"scheme {name!r}: {text!r} is not a number; there are {SCHEME_NAMES}") from None


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise UsageError(f"ema:{alpha:g}: alpha must be above 0 and at most 1")
