"""A quadratic toy whose every loss is known exactly: L = ½ Σ λ x² under plain SGD with noisy gradients, at a
constant rate and then any decay. Expectations, no samples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Coordinates I: curvatures, starts, variances of the gradient's noise; trained at `rate`."""

    curvature_I: Floats
    start_I: Floats
    noise_I: Floats
    rate: float
    floor: float = 2.0

    def state(self, step: int) -> tuple[Floats, Floats]:
        """Mean and variance of each coordinate after `step` steps at the constant rate."""
        shrink = 1 - self.rate * self.curvature_I
        steady = self.rate**2 * self.noise_I / (1 - shrink**2)
        return self.start_I * shrink**step, steady * (1 - shrink ** (2 * step))

    def loss(self, mean: Floats, variance: Floats) -> float:
        return float(self.floor + 0.5 * (self.curvature_I * (mean**2 + variance)).sum())

    def raw(self, step: int) -> float:
        return self.loss(*self.state(step))

    def annealed(self, step: int, shares: Floats) -> float:
        mean, variance = self.state(step)
        for share in shares:
            shrink = 1 - self.rate * share * self.curvature_I
            mean, variance = mean * shrink, shrink**2 * variance + (self.rate * share) ** 2 * self.noise_I
        return self.loss(mean, variance)

    def merged(self, steps: list[int], weights: Floats) -> float:
        """Of a mean of checkpoints; two covary as the earlier one varies, shrunk by the steps between."""
        shrink = 1 - self.rate * self.curvature_I
        mean, variance = np.zeros_like(shrink), np.zeros_like(shrink)
        for i, (a, w_a) in enumerate(zip(steps, weights, strict=True)):
            mean += w_a * self.state(a)[0]
            variance += w_a**2 * self.state(a)[1]
            for b, w_b in zip(steps[i + 1 :], weights[i + 1 :], strict=True):
                variance += 2 * w_a * w_b * self.state(a)[1] * shrink ** (b - a)
        return self.loss(mean, variance)


def power_law_toy(
    *, exponent: float = 1.0, slope: float = 0.7, rate: float = 0.3, noise: float = 0.02
) -> Toy:
    """Curvatures over six decades; energy at the start and noise are powers of them."""
    curvature = np.logspace(0, -6, 240)
    return Toy(
        curvature_I=curvature,
        start_I=np.sqrt(0.02 * curvature ** (0.35 * exponent - 1)),
        noise_I=noise * curvature**slope,
        rate=rate,
    )
