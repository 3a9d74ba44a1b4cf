"""What a merge of a window would gain over its newest checkpoint: noise that averages out, less what drift
costs.

The weights of a merge stand where the run stood at the mean of its members' steps: that costs what the loss
fell since. In exchange noise averages out. How much loss the noise makes is not seen from weights alone; its
scale is the gradient's length times that of a noisy step, to a power that is calibrated over runs. How much
of it a window removes follows from how far its members spread, in steps of that noise.
"""

# W windows

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pma.diagnosis.evidence import Evidence
from pma.errors import UsageError

Floats = NDArray[np.float64]
CALIBRATION = "nano"
_LEAST = 1e-150


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Calibrated over runs. Nats of noise: exp(`scale`) · (gradient · noisy step)^`power`, or where no
    gradient is logged of the noisy step's share of the weights; times the rate's share of its peak to
    `rate_power`.
    `spread_steps`: members that spread by the noise of so many steps have lost most of what they had in
    common. `drift`: what a nat of fall costs, 1 in theory; `bend`: what one of bend does; `settled`: the
    share of both that is left where the rate has come down to nothing, as the loss then falls because noise
    settles, which averaging does as well. `error`, `error_of_cost`: one standard error of a gain, in nats
    and as a share of what drift and bend cost.
    """

    scale: float
    power: float
    rate_power: float
    spread_steps: float
    drift: float
    bend: float
    settled: float
    error: float
    error_of_cost: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a calibration file."""
        return cls(**{field.name: float(values[field.name]) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """`gain` in nats a token over the newest checkpoint: `noise` removed less `cost`, that of drift;
    `error`: one standard error.
    """

    gain: float
    noise: float
    cost: float
    error: float


@cache
def calibration(name: str = CALIBRATION) -> Mapping[str, Constants]:
    """`with_gradient` and `without_gradient` of a calibration that comes with the package."""
    place = files("pma.diagnosis").joinpath("calibrations", f"{name}.json")
    if not place.is_file():
        raise UsageError(f"there is no calibration {name!r}; there is {CALIBRATION}")
    value = json.loads(place.read_text(encoding="utf-8"))
    return {key: Constants.of(value[key]) for key in ("with_gradient", "without_gradient")}


def predict(found: Evidence, constants: Constants) -> Predicted:
    """The gain of the window's plain mean. `constants`: those with a gradient where there is one."""
    noise, cost = (float(part[0]) for part in noise_and_cost([found], constants))
    error = float(np.hypot(constants.error, constants.error_of_cost * cost))
    return Predicted(gain=noise - cost, noise=noise, cost=cost, error=error)


def noise_and_cost(windows_W: Sequence[Evidence], constants: Constants) -> tuple[Floats, Floats]:
    """Nats of noise that the mean of each window removes, and what its drift costs."""
    step_W = np.array([max(found.noisy_step, _LEAST) for found in windows_W])
    # in nats where the gradient is known, a share of the weights where not
    unit_W = [1 / max(w.weights, _LEAST) if w.gradient is None else w.gradient for w in windows_W]
    count_W, spread_W, share_W, fall_W, bend_W = np.array(
        [(w.count, w.spread, w.rate_share, w.fall, w.bend) for w in windows_W]
    ).T
    nats_W = np.exp(constants.scale + constants.power * np.log(np.maximum(step_W * unit_W, _LEAST)))
    apart_W = -np.expm1(-spread_W / np.maximum(constants.spread_steps * step_W**2, _LEAST))
    removed_W = nats_W * share_W**constants.rate_power * (1 - 1 / count_W) * apart_W
    drifts_W = constants.settled + (1 - constants.settled) * share_W
    return removed_W, drifts_W * (constants.drift * fall_W + constants.bend * bend_W)
