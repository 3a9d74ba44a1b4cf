"""What forecasts from merges are off by on real runs, learned from runs whose decays are known.

The quadratic picture of `pma.forecast.probes` promises too little of long decays and too much of short ones,
by a share of the gain that grows with the logarithm of how far a decay moves the drift. Two constants take
that off, and a third is the exponent of the drift's loss, which single runs leave open. All are in shares of
the gain, so they know no nats and no size of a model. What remains is told as an interval. It has a part that
all forecasts of a run share, one that forecasts from one step share, and one of each; so decays of the run
itself tell the first, or the first two.
"""

# C cases, each a decay of a run whose loss is known

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.averaging.decay import DECAYS
from pma.errors import FormatError, InputError, UsageError, printable
from pma.forecast.probes import DRAWS, Probe, Spread, annealed_loss, spread_of

Floats = NDArray[np.float64]

DEFAULT = "nano"
_FOLDER = "calibrations"
_ALPHAS = tuple(round(0.2 + 0.05 * i, 2) for i in range(21))
_FEWEST_GROUPS = 2
_VERSION = 1
_ERRORS = ("of_run", "of_fork", "of_decay", "probe_error")


@dataclass(frozen=True, kw_only=True)
class Decay:
    """The learning rate's last stretch: `shape` (cosine, linear, 1-sqrt) over `steps`, to `floor` of it."""

    shape: str
    steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in DECAYS:
            raise UsageError(f"there is no decay {self.shape!r}; there are {', '.join(DECAYS)}")
        if self.steps < 1:
            raise UsageError(f"a decay of {self.steps} steps is none; expected at least 1")
        if not 0 <= self.floor < 1:
            raise UsageError(f"a decay's floor must lie between 0 and 1, not {self.floor:g}")

    @property
    def shares(self) -> Floats:
        """The share of the constant rate at each of its steps."""
        shape = DECAYS[self.shape]
        fallen = np.array([max(shape(i / self.steps), 0.0) for i in range(1, self.steps + 1)])
        return self.floor + (1 - self.floor) * fallen


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decay of a run, the probes that were there before it, and the held-out `loss` that it gave."""

    run: str
    group: str
    from_step: int
    probes: tuple[Probe, ...]
    shares_T: Floats
    loss: float


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the quadratic picture says of a decay: `loss`, and the `gain` over what a raw checkpoint has where
    it starts. `error`: a standard error of the loss, of the probes alone. `moved`: how far the decay moves
    the drift, as a share of the steps before it.
    """

    loss: float
    gain: float
    error: float
    moved: float
    longest_window: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Loss = promise - gain · (`offset` + `slope` · ln moved), with exponent `alpha`. Standard deviations of
    what that leaves, in shares of the gain: `of_run`, shared by a run's forecasts, `of_fork`, by those from
    one step, `of_decay`, each one's own; `freedom`: theirs. `probe_error`: what of it the probes state.
    `moved`: from, to. `what`: where it comes from.
    """

    name: str
    what: str
    alpha: float
    offset: float
    slope: float
    of_run: float
    of_fork: float
    of_decay: float
    freedom: int
    probe_error: float
    moved: tuple[float, float]
    runs: int
    cases: int

    def corrected(self, promise: Promise) -> float:
        """The loss after the decay."""
        return promise.loss - promise.gain * (self.offset + self.slope * math.log(promise.moved))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Calibration:
        """The inverse of `to_json`. Raises ValueError, LookupError or TypeError for what is none."""
        if value["version"] != _VERSION:
            raise ValueError(f"version {value['version']}, expected {_VERSION}")
        low, high = value["moved"]
        numbers = {name: float(value[name]) for name in (*_ERRORS, "alpha", "offset", "slope")}
        if not all(map(math.isfinite, (*numbers.values(), float(low), float(high)))):
            raise ValueError("numbers that are not finite")
        if float(low) <= 0 or min(numbers["alpha"], *(numbers[name] for name in _ERRORS)) < 0:
            raise ValueError("negative numbers")
        freedom = int(value["freedom"])
        if freedom < 1:
            raise ValueError("no degrees of freedom")
        return cls(
            name=str(value["name"]),
            what=str(value["what"]),
            moved=(float(low), float(high)),
            freedom=freedom,
            runs=int(value["runs"]),
            cases=int(value["cases"]),
            **numbers,
        )


def named(name: str) -> Calibration:
    """The calibration of that name that comes with the package, or in the file of that name. Raises
    UsageError where there is none, FormatError where the file is none.
    """
    path = Path(name)
    if not path.is_file():
        packaged = resources.files("pma.forecast") / _FOLDER / f"{name}.json"
        if path.name != name or not packaged.is_file():
            there = ", ".join(names())
            raise UsageError(
                f"--calibration {name}: no such file, and of those that are kept there is {there}"
            )
        return Calibration.from_json(json.loads(packaged.read_text()))
    try:
        return Calibration.from_json(json.loads(path.read_text()))
    except (ValueError, LookupError, TypeError) as error:
        raise FormatError(f"{path} is no calibration: {printable(repr(error))}") from error


def names() -> list[str]:
    """The calibrations that come with the package."""
    folder = resources.files("pma.forecast") / _FOLDER
    return sorted(each.name.removesuffix(".json") for each in folder.iterdir() if each.name.endswith(".json"))


def promise(spread: Spread, shares_T: Floats) -> Promise:
    """What `spread` says of the decay `shares_T`."""
    loss, error = annealed_loss(spread, shares_T)
    at_rate = spread.drift_loss(spread.from_step)
    return Promise(
        loss=loss,
        gain=max(at_rate - loss, 0.0),
        error=error,
        moved=float(np.sum(shares_T)) / spread.from_step,
        longest_window=spread.longest_window,
    )


def calibrate(cases: Sequence[Case], *, name: str, what: str) -> Calibration:
    """The constants that fit `cases` best, every run counted alike, and what they are off by on groups that
    are left out.

    Raises InputError for fewer than two groups: nothing could be left out.
    """
    groups = sorted({case.group for case in cases})
    if len(groups) < _FEWEST_GROUPS:
        raise InputError(
            f"{len(cases)} known decays of {len(groups)} group(s) of runs; a calibration needs at least "
            f"{_FEWEST_GROUPS} groups, so that one can be left out to see how far it is off"
        )
    promised = _promises(cases)
    alpha, (offset, slope) = _best(cases, promised, np.ones(len(cases), dtype=bool))
    left = np.zeros(len(cases))  # in shares of the gain
    for group in groups:
        own = np.array([case.group == group for case in cases])
        other, constants = _best(cases, promised, ~own)
        left[own] = _misses(cases, promised[other], constants)[own]
    of_run, of_fork, of_decay = components(cases, left)
    shown = [promise(spread_at(c.probes, c.from_step, alpha, DRAWS), c.shares_T) for c in cases]
    return Calibration(
        name=name,
        what=what,
        alpha=alpha,
        offset=offset,
        slope=slope,
        of_run=of_run,
        of_fork=of_fork,
        of_decay=of_decay,
        freedom=max(len(groups) - 1, 1),
        probe_error=float(np.sqrt(np.mean([(p.error / p.gain) ** 2 for p in shown if p.gain > 0]))),
        moved=(min(p.moved for p in shown), max(p.moved for p in shown)),
        runs=len({case.run for case in cases}),
        cases=len(cases),
    )


@cache
def spread_at(
    probes: tuple[Probe, ...], from_step: int, alpha: float, draws: int = DRAWS, seed: int = 0
) -> Spread:
    """`spread_of` with a given exponent, found once: a run is forecast for several decays, with several
    exponents, and with several groups left out.
    """
    return spread_of(probes, from_step, alphas=(alpha,), draws=draws, seed=seed)


def _promises(cases: Sequence[Case]) -> dict[float, list[Promise]]:
    """By exponent."""
    return {
        alpha: [promise(spread_at(c.probes, c.from_step, alpha, 0), c.shares_T) for c in cases]
        for alpha in _ALPHAS
    }


def _best(
    cases: Sequence[Case], promised: dict[float, list[Promise]], used: NDArray[np.bool_]
) -> tuple[float, tuple[float, float]]:
    """The exponent and the constants of least squares over the `used` cases, each run with one vote."""
    votes = np.array([1 / sum(c.run == case.run for c in cases) for case in cases]) * used
    found = []
    for alpha, each in promised.items():
        columns = np.array([[1.0, math.log(p.moved)] for p in each])
        short = np.array([_short(case, p) for case, p in zip(cases, each, strict=True)])
        root = np.sqrt(votes)[:, None]
        constants, *_ = np.linalg.lstsq(root * columns, root[:, 0] * short, rcond=None)
        misses = short - columns @ constants
        found.append((float(votes @ misses**2), alpha, (float(constants[0]), float(constants[1]))))
    _, alpha, constants2 = min(found)
    return alpha, constants2


def _short(case: Case, made: Promise) -> float:
    """By how much of the gain the promise is above the truth."""
    return (made.loss - case.loss) / max(made.gain, 1e-9)


def _misses(cases: Sequence[Case], each: Sequence[Promise], constants: tuple[float, float]) -> Floats:
    """What the constants leave, in shares of the gain."""
    offset, slope = constants
    return np.array(
        [_short(c, p) - offset - slope * math.log(p.moved) for c, p in zip(cases, each, strict=True)]
    )


def components(cases: Sequence[Case], left: Floats) -> tuple[float, float, float]:
    """Standard deviations of what runs share, of what forks share beside it, and of the rest."""
    run = np.array([case.run for case in cases])
    fork = np.array([case.from_step for case in cases])
    same_run, same_fork = run[:, None] == run, (run[:, None] == run) & (fork[:, None] == fork)
    product = left[:, None] * left
    other = ~np.eye(len(cases), dtype=bool)
    total = float(np.mean(left**2))
    of_fork = _mean(product, same_fork & other, total, 0.0)
    of_run = _mean(product, same_run & ~same_fork, of_fork, 0.0)
    # no part may be negative, and the three add up to all of it
    return math.sqrt(of_run), math.sqrt(of_fork - of_run), math.sqrt(max(total - of_fork, 1e-12))


def _mean(values: Floats, where: NDArray[np.bool_], most: float, least: float) -> float:
    return min(max(float(values[where].mean()), least), most) if where.any() else most
