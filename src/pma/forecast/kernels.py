"""The compiled sums behind the laws, each with its derivatives. No fast-math: forecasts repeat to the bit."""

# R rows (steps with a loss), J nodes (places where the rate changes), T steps

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; the machine code is kept beside the module or in the user's cache folder."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither place can be written to
        return njit(nogil=True, error_model="numpy")(function)


@_compiled
def response_sums(
    sums_R: Any,
    far_R: Any,
    near_R: Any,
    ends_R: Any,
    before_J: Any,
    gap_J: Any,
    log_rate_J: Any,
    c: float,
    beta: float,
    gamma: float,
) -> Any:
    """Σ_j gap_j [1 - (1 + c η_j^-γ S_j)^-β] with S_j = sums_r - before_j, for each row over the nodes before
    `far_r` and from `near_r` to `ends_r`; and its derivatives by ln c, β and γ. Four columns.
    """
    out = np.zeros((len(sums_R), 4))
    scale_J = c * np.exp(-gamma * log_rate_J)
    for r in range(len(sums_R)):
        value, by_log_c, by_beta, by_gamma = 0.0, 0.0, 0.0, 0.0
        for i in range(far_R[r] + ends_R[r] - near_R[r]):
            j = i if i < far_R[r] else i - far_R[r] + near_R[r]
            s = sums_R[r] - before_J[j]
            if s <= 0:  # a rate of 0 from here on has no response, and its power would be infinite
                continue
            x = scale_J[j] * s
            log_1x = np.log1p(x)
            kept = np.exp(-beta * log_1x)
            slope = gap_J[j] * beta * kept * x / (1 + x)
            value += gap_J[j] * (1 - kept)
            by_log_c += slope
            by_beta += gap_J[j] * kept * log_1x
            by_gamma -= slope * log_rate_J[j]
        out[r, 0], out[r, 1], out[r, 2], out[r, 3] = value, by_log_c, by_beta, by_gamma
    return out


@_compiled
def momentum_sums(gaps_T: Any, steps_R: Any, memory: float) -> Any:
    """S2 at each row, Σ_(i≤t) m_i with m_i = λ m_(i-1) + gap_i, and its derivative by λ. Two columns."""
    out = np.zeros((len(steps_R), 2))
    m, dm, total, dtotal, r = 0.0, 0.0, 0.0, 0.0, 0
    for t in range(len(gaps_T)):
        dm = memory * dm + m
        m = memory * m + gaps_T[t]
        total += m
        dtotal += dm
        while r < len(steps_R) and steps_R[r] == t:
            out[r, 0], out[r, 1] = total, dtotal
            r += 1
    return out


@_compiled
def kept_variance(shares_T: Any, rates_J: Any) -> Any:
    """What is left of a variance of 1 after steps at `shares_T` of the rate at which it would stay."""
    out = np.ones(len(rates_J))
    for j in range(len(rates_J)):
        fresh = 1 - (1 - rates_J[j]) ** 2
        for t in range(len(shares_T)):
            out[j] = (1 - rates_J[j] * shares_T[t]) ** 2 * out[j] + shares_T[t] ** 2 * fresh
    return out
