"""The best learning rate of a kind of model, between the rates that were tried, and how sure it is."""

# R rates in rising order, D documents, B resamplings

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
_RESAMPLINGS = 2_000


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """`rate` with its 95% interval over documents. `at_the_edge`: the best of the rates tried is the lowest
    or the highest, so that the optimum may lie beyond.
    """

    rate: float
    low: float
    high: float
    at_the_edge: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def optimum(rate_R: Sequence[float], nats_RD: ArrayLike, token_D: ArrayLike) -> Optimum:
    """The vertex of the parabola in log rate through the best rate tried and its neighbours."""
    nats, tokens = np.asarray(nats_RD, dtype=np.float64), np.asarray(token_D, dtype=np.float64)
    log_B = _vertices(rate_R, _resampled(nats, tokens))
    loss_R = nats.sum(axis=1) / tokens.sum()
    rate = float(np.exp(_vertex(np.log(rate_R), loss_R)))
    low, high = np.exp(np.quantile(log_B, [0.025, 0.975]))
    best = int(loss_R.argmin())
    return Optimum(rate=rate, low=float(low), high=float(high), at_the_edge=best in (0, len(loss_R) - 1))


def optima_ratio(
    rate_R: Sequence[float], above_RD: ArrayLike, below_RD: ArrayLike, token_D: ArrayLike
) -> Optimum:
    """The optimum of one kind over that of another, resampled on the same documents."""
    tokens = np.asarray(token_D, dtype=np.float64)
    pair = [np.asarray(nats, dtype=np.float64) for nats in (above_RD, below_RD)]
    found = [optimum(rate_R, nats, tokens) for nats in pair]
    above_B, below_B = (_vertices(rate_R, _resampled(nats, tokens)) for nats in pair)
    low, high = np.exp(np.quantile(above_B - below_B, [0.025, 0.975]))
    return Optimum(
        rate=found[0].rate / found[1].rate,
        low=float(low),
        high=float(high),
        at_the_edge=any(each.at_the_edge for each in found),
    )


def _resampled(nats_RD: Values, token_D: Values) -> Values:
    """Losses of resampled documents, shape (B, R); the same documents with every call."""
    documents = len(token_D)
    drawn_BD = np.random.default_rng(0).multinomial(
        documents, np.full(documents, 1 / documents), _RESAMPLINGS
    )
    loss_BR: Values = (drawn_BD @ nats_RD.T) / (drawn_BD @ token_D)[:, None]
    return loss_BR


def _vertices(rate_R: Sequence[float], loss_BR: Values) -> Values:
    return np.array([_vertex(np.log(rate_R), loss_R) for loss_R in loss_BR])


def _vertex(log_R: Values, loss_R: Values) -> float:
    """At the edge it is the edge itself: nothing is extrapolated."""
    best = int(loss_R.argmin())
    if best in (0, len(loss_R) - 1):
        return float(log_R[best])
    a, b, _ = np.polyfit(log_R[best - 1 : best + 2] - log_R[best], loss_R[best - 1 : best + 2], 2)
    return float(log_R[best] - b / (2 * a))
