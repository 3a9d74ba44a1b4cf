"""Laws of annealing: the loss at a step from the learning rates of all steps before.

Tissue et al. (arXiv 2408.11029):   L = L0 + A S1^-α - C S2,
    S1(t) = Σ_(i≤t) η_i,  S2(t) = Σ_(i≤t) Σ_(k≤i) (η_(k-1) - η_k) λ^(i-k).
Multi-power (Luo et al., arXiv 2503.12811):
    L = L0 + A S1^-α - B Σ_(k≤t) (η_(k-1) - η_k) [1 - (1 + C η_k^-γ S_k)^-β],  S_k(t) = Σ_(τ=k..t) η_τ.

S1 counts the warmup (their S_W), and the warmup's gaps are in the sums: without them the published parameters
of the multi-power law are off by about B·η_peak, 0.1 nats. A rate of 0 has no response until it rises again:
the limit of the formula for γ < 1.
"""

# R rows, P parameters; jacobian_RP is of the loss by the parameters

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.forecast.gaps import Gaps, compress
from pma.forecast.kernels import momentum_sums, response_sums
from pma.forecast.schedules import Schedule

Floats = NDArray[np.float64]
#: loss_R and jacobian_RP
Evaluated = tuple[Floats, Floats]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law by `name`: what its `parameters` are called, which of them are the annealing term
    (`of_annealing`), and the function that evaluates it.
    """

    name: str
    source: str
    parameters: tuple[str, ...]
    of_annealing: tuple[str, ...]
    evaluate: Callable[[Floats, Gaps], Evaluated]

    def vector(self, named: Mapping[str, float]) -> Floats:
        """Parameters in the law's order."""
        return np.array([named[name] for name in self.parameters])


def loss(law: Law, parameters: Mapping[str, float], schedule: Schedule, steps: NDArray[np.int64]) -> Floats:
    """The loss that `law` gives at `steps` (rising, within the schedule)."""
    return law.evaluate(law.vector(parameters), compress(schedule, steps))[0]


def _multi_power(values_P: Floats, gaps: Gaps) -> Evaluated:
    floor, a, alpha, b, c, beta, gamma = values_P
    power_R = gaps.sums_R**-alpha
    places = (gaps.far_R, gaps.near_R, gaps.ends_R, gaps.before_J)
    sums = response_sums(gaps.sums_R, *places, gaps.gap_J, gaps.log_rate_J, c, beta, gamma)
    response_R = sums[:, 0]
    jacobian_RP = np.column_stack(
        (
            np.ones_like(power_R),
            power_R,
            -a * power_R * np.log(gaps.sums_R),
            -response_R,
            -b * sums[:, 1] / c,
            -b * sums[:, 2],
            -b * sums[:, 3],
        )
    )
    return floor + a * power_R - b * response_R, jacobian_RP


def _tissue(values_P: Floats, gaps: Gaps) -> Evaluated:
    floor, a, alpha, c, memory = values_P
    power_R = gaps.sums_R**-alpha
    momentum_R, by_memory_R = momentum_sums(gaps.gaps_T, gaps.steps_R, memory).T
    jacobian_RP = np.column_stack(
        (
            np.ones_like(power_R),
            power_R,
            -a * power_R * np.log(gaps.sums_R),
            -momentum_R,
            -c * by_memory_R,
        )
    )
    return floor + a * power_R - c * momentum_R, jacobian_RP


MULTI_POWER = Law(
    name="multi-power",
    source="arXiv 2503.12811",
    parameters=("L0", "A", "alpha", "B", "C", "beta", "gamma"),
    of_annealing=("B", "C", "beta", "gamma"),
    evaluate=_multi_power,
)
TISSUE = Law(
    name="tissue",
    source="arXiv 2408.11029",
    parameters=("L0", "A", "alpha", "C", "lambda"),
    of_annealing=("C", "lambda"),
    evaluate=_tissue,
)
LAWS = {law.name: law for law in (MULTI_POWER, TISSUE)}
