"""Averaging that emulates a learning-rate decay, and the identity between the two.

With θ_j = θ_0 - Σ_(i≤j) g_i and 1 ≥ w_1 ≥ … ≥ w_k ≥ 0:  Σ_j c_j θ_j = θ_0 - Σ_i w_i g_i  for  c_k = w_k, c_j
= w_j - w_(j+1), c_0 = 1 - w_1. Source: WSM, arXiv 2507.17634, theorem 3.1. It is an identity on the recorded
steps, not a claim that the optimizer would have taken them.
"""

# N checkpoints, k = N-1 updates between them; x: progress through the decay, 0 … 1

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pma.errors import UsageError

Decay = Callable[[float], float]


def linear(x: float) -> float:
    """1 - x. For even spacing its weights are all 1/N: a simple average is a linear decay."""
    return 1 - x


def cosine(x: float) -> float:
    """½(1 + cos πx)."""
    return 0.5 * (1 + math.cos(math.pi * x))


def one_minus_sqrt(x: float) -> float:
    """1 - √x. It falls fastest at the start, so the oldest checkpoint gets the most weight."""
    return 1 - math.sqrt(x)


DECAYS: Mapping[str, Decay] = {"linear": linear, "cosine": cosine, "1-sqrt": one_minus_sqrt}


def decay_weights(decay: Decay, positions: Sequence[float], *, floor: float = 0.0) -> NDArray[np.float64]:
    """Weights c_i = f(x_i) - f(x_(i+1)) of N checkpoints at `positions` (steps or tokens, ascending), oldest
    first.

    x_i = (t_i - t_0) / ((t_last - t_0)·N/(N-1)) and x_N = 1, so even spacing gives x_i = i/N. With a floor r
    the decay ends at r: f becomes r + (1-r) f, and what it leaves goes to the newest. Raises UsageError for
    positions that do not ascend or a floor outside [0, 1].
    """
    if not 0 <= floor <= 1:
        raise UsageError(f"a decay's floor must lie between 0 and 1, not {floor:g}")
    count = len(positions)
    if count == 1:
        return np.ones(1)
    steps = np.asarray(positions, dtype=np.float64)
    if (np.diff(steps) <= 0).any():
        raise UsageError("a decay needs checkpoints at ascending positions; these do not ascend")
    x_N = (steps - steps[0]) / ((steps[-1] - steps[0]) * count / (count - 1))
    f_N1 = np.array([*(decay(float(x)) for x in x_N), 0.0])
    f_N1[:count] = floor + (1 - floor) * f_N1[:count]
    f_N1[count] = 0.0
    weights_N: NDArray[np.float64] = f_N1[:-1] - f_N1[1:]
    return weights_N


def weights_from_rates(rates_k: Sequence[float]) -> NDArray[np.float64]:
    """c_0 … c_k from relative rates w_1 … w_k. Raises UsageError unless 1 ≥ w_1 ≥ … ≥ w_k ≥ 0."""
    w_k = np.asarray(rates_k, dtype=np.float64)
    padded = np.concatenate(([1.0], w_k, [0.0]))
    if (np.diff(padded) > 0).any():
        raise UsageError("relative learning rates must fall from at most 1 to at least 0")
    return padded[:-1] - padded[1:]


def rates_from_weights(weights_N: Sequence[float]) -> NDArray[np.float64]:
    """The inverse: w_i = Σ_(j≥i) c_j for i = 1 … k."""
    c_N = np.asarray(weights_N, dtype=np.float64)
    tails: NDArray[np.float64] = np.cumsum(c_N[::-1])[::-1][1:]
    return tails
