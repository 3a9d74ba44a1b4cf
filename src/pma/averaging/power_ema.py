"""Power-function averages: weights of past steps that grow as t^γ, and other profiles put together from them.

A track x_t = β x_(t-1) + (1 - β) θ_t with β = (1 - 1/t)^(γ+1) needs no choice of a time scale: its width is a
share σ of the run so far. Source: Karras et al., arXiv 2312.02696, section 3 and appendix C; differs: steps
are weighed as the recursion weighs them, not as its limit, and coefficients sum to 1, so that no weight is
scaled.
"""

# T steps, K stored profiles; a profile gives each step its weight, and its weights sum to 1

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.errors import UsageError

Weights = NDArray[np.float64]
#: weights of the steps asked for
Profile = Callable[[NDArray[np.int64]], Weights]

_STEPS_AT_ONCE = 65_536


def gamma_from_sigma(sigma: float) -> float:
    """The exponent γ of the power function whose relative standard deviation is σ.

    The largest real root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²). Raises UsageError outside 0 < σ < 1/√12 =
    0.289, the deviation of the plain mean (γ = 0).
    """
    if not 0 < sigma < 1 / math.sqrt(12):
        raise UsageError(f"a relative width of {sigma:g}: expected one above 0 and below 0.288, such as 0.05")
    inverse = sigma**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    real = roots[np.abs(roots.imag) < 1e-9 * np.abs(roots.real)].real
    return float(np.max(real))


def sigma_from_gamma(gamma: float) -> float:
    """σ = √(γ+1) / ((γ+2) √(γ+3)), in shares of the run so far."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def share_kept(gamma: float, before_step: int, step: int) -> float:
    """How much of a track is kept when `step` comes after `before_step`: the product of β over the steps
    between, (before / step)^(γ+1).
    """
    return math.pow(before_step / step, gamma + 1.0)


def inner_product(gamma_a: float, end_a: float, gamma_b: float, end_b: float) -> float:
    """⟨p_a, p_b⟩ of the profiles (γ+1) τ^γ / t^(γ+1) on [0, t]. Source: arXiv 2312.02696, appendix C."""
    early, late = ((gamma_a, end_a), (gamma_b, end_b))[:: 1 if end_a <= end_b else -1]
    share = math.pow(early[1] / late[1], late[0])
    return (gamma_a + 1) * (gamma_b + 1) * share / ((gamma_a + gamma_b + 1) * late[1])


def power_profile(gamma: float, last_step: int, *, first_step: int = 1, every: int = 1) -> Profile:
    """The weights of a track at `last_step` that recorded `first_step` and then each multiple of `every`.

    Its first value stands for all steps before.
    """

    def profile(steps_T: NDArray[np.int64]) -> Weights:
        recorded = (steps_T == first_step) | ((steps_T > first_step) & (steps_T % every == 0))
        before_T = np.maximum((steps_T - 1) // every * every, first_step) / last_step
        share_T = steps_T / last_step
        weights_T = share_T ** (gamma + 1) - np.where(steps_T == first_step, 0.0, before_T ** (gamma + 1))
        weights_T[~recorded | (steps_T > last_step)] = 0.0
        return weights_T

    return profile


def window_profile(first_step: int, last_step: int) -> Profile:
    """The plain mean of the steps from `first_step` to `last_step`."""

    def profile(steps_T: NDArray[np.int64]) -> Weights:
        inside_T = (steps_T >= first_step) & (steps_T <= last_step)
        return inside_T / (last_step - first_step + 1.0)

    return profile


def steps_profile(weights: dict[int, float]) -> Profile:
    """Given weights of single steps: those of a scheme over snapshots."""

    def profile(steps_T: NDArray[np.int64]) -> Weights:
        return np.array([weights.get(int(step), 0.0) for step in steps_T])

    return profile


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Coefficients of the stored profiles, summing to 1, and the distance of what they give from the target,
    relative to the target's own length (both as vectors over steps).
    """

    coefficients: tuple[float, ...]
    relative_error: float


def reconstruct(stored: Sequence[Profile], target: Profile, last_step: int) -> Reconstruction:
    """The combination of `stored` nearest to `target` over steps 1 … `last_step`, by least squares in fp64.

    With Σc = 1 put in, Σ_(k<K) c_k (p_k - p_K) is fitted to (target - p_K). Solved by QR of blocks of steps:
    the Gram matrix has the square of their condition number, and tracks are much alike. Raises UsageError for
    none stored.
    """
    if not stored:
        raise UsageError("no track is stored; a profile is put together from stored tracks")
    triangle: NDArray[np.float64] = np.zeros((0, len(stored)))
    length = 0.0
    for steps_T in _blocks(last_step):
        last_T, target_T = stored[-1](steps_T), target(steps_T)
        columns = [profile(steps_T) - last_T for profile in stored[:-1]] + [target_T - last_T]
        rows = np.vstack([triangle, np.column_stack(columns)])
        triangle = np.asarray(np.linalg.qr(rows, mode="r"))
        length += float(target_T @ target_T)
    if not length:
        raise UsageError(f"the target has no weight in steps 1 to {last_step}")
    free, *_ = np.linalg.lstsq(triangle[:, :-1], triangle[:, -1], rcond=None)
    missed = triangle[:, :-1] @ free - triangle[:, -1]
    return Reconstruction(
        coefficients=(*map(float, free), float(1 - free.sum())),
        relative_error=float(np.linalg.norm(missed) / math.sqrt(length)),
    )


def _blocks(last_step: int) -> Iterator[NDArray[np.int64]]:
    for first in range(1, last_step + 1, _STEPS_AT_ONCE):
        yield np.arange(first, min(first + _STEPS_AT_ONCE, last_step + 1), dtype=np.int64)
