"""Curves as training gives them, made up: a falling loss with noise, and spikes of known size at known
steps.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def healthy_loss(entries: int, seed: int, *, noise: float = 0.05, correlated: float = 0.0) -> Floats:
    """A power law from 6 to about 3 with noise, `correlated` from entry to entry."""
    random = np.random.default_rng(seed)
    fall = 2.5 + 3.5 * (1 + np.arange(entries) / 50) ** -0.4
    shocks = random.standard_normal(entries)
    for i in range(1, entries):
        shocks[i] = correlated * shocks[i - 1] + np.sqrt(1 - correlated**2) * shocks[i]
    return fall + noise * shocks


def healthy_grad_norm(entries: int, seed: int, *, spread: float = 0.15) -> Floats:
    """Log-normal around a slowly falling level."""
    random = np.random.default_rng(seed)
    level = 0.3 + 2 * np.exp(-np.arange(entries) / 100)
    return level * np.exp(spread * random.standard_normal(entries))
