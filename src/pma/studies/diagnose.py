"""Does a diagnosis tell, without evaluating, which merges beat last? Learning rates × stages × windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pma.studies import charts, diagnose_judging, tuning
from pma.studies.cases import loss_characters, measured
from pma.studies.diagnose_judging import DIAGNOSIS, GROUPINGS
from pma.studies.diagnose_telling import tell
from pma.studies.grams import Grams
from pma.studies.lab import Lab
from pma.studies.making import Anneal, Trunk
from pma.studies.measuring import Measured
from pma.studies.presets import MIXTURE, Preset

__all__ = ["VERSION", "draw", "run", "tell"]

VERSION = 1
CONSTANT, DECAY = "constant rate", "decay"
LAST = "last"
_End = tuple[int, tuple[tuple[int, int], ...]]  # step, and windows (N, V) that end there
# shares of the run at which windows end, and windows there: N checkpoints, V of their distances apart
_ENDS = (
    (1 / 15, ((2, 1), (3, 1), (4, 1))),
    (2 / 15, ((3, 1), (5, 1), (8, 1), (12, 1))),
    (1 / 3, ((3, 1), (5, 1), (10, 1), (10, 2), (9, 4))),
    (2 / 3, ((3, 1), (10, 1), (10, 2), (10, 4), (10, 8))),
    (1, ((3, 1), (10, 1), (10, 2), (10, 4), (10, 8), (12, 10))),
)
# the same of a decay
_DECAY_ENDS = ((1 / 2, ((3, 1), (6, 1), (10, 1))), (1, ((3, 1), (10, 1), (20, 1))))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where windows end: step `at` of `run`, whose phase begins after `phase_start`."""

    run: Trunk | Anneal
    size: str
    family: str
    rate: float
    stage: str
    at: int
    phase_start: int
    windows: tuple[tuple[int, int], ...]

    @property
    def cluster(self) -> str:
        """The training run that it belongs to: a fork goes with its trunk."""
        return f"{self.size} {self.rate:g}"


def places(lab: Lab) -> list[Place]:
    """All of them, without windows that reach before the phase."""
    preset = lab.preset
    found: list[Place] = []
    for size in preset.sizes:
        more = preset.extra_rates if size.name == preset.middle[0] else ()
        for rate in (*size.rates, *more):
            trunk = tuning.trunk(lab, size, rate, lab.seeds[0])
            fork = tuning.anneal(lab, trunk)
            warmup = size.recipe.optimizer.warmup_steps
            ends: list[tuple[Trunk | Anneal, int, _End]] = []
            ends += [(trunk, warmup, end) for end in _there(_ENDS, 0, preset.steps, warmup, preset)]
            ends += [
                (fork, fork.step, e) for e in _there(_DECAY_ENDS, fork.step, fork.steps, fork.step, preset)
            ]
            found += [
                Place(
                    run=run,
                    size=size.name,
                    family=size.family,
                    rate=rate,
                    stage=CONSTANT if run is trunk else DECAY,
                    at=at,
                    phase_start=phase_start,
                    windows=windows,
                )
                for run, phase_start, (at, windows) in ends
            ]
    return found


def _there(
    ends: Sequence[tuple[float, tuple[tuple[int, int], ...]]],
    start: int,
    steps: int,
    phase_start: int,
    preset: Preset,
) -> Iterator[_End]:
    every = preset.every_steps
    for share, windows in ends:
        at = start + round(share * steps / every) * every
        inside = tuple((n, v) for n, v in windows if at - (n - 1) * v * every > phase_start)
        if inside:
            yield at, inside


def run(lab: Lab) -> dict[str, Any]:
    """Measure every window, predict each from weights and log alone, and judge the predictions."""
    every = lab.preset.every_steps
    found = places(lab)
    lab.make(Grams(run=place.run, every=every) for place in found)
    wanted = {
        number: {
            LAST: [Measured(run=place.run, at=place.at)],
            **{
                _name(last, apart): [Measured(run=place.run, at=place.at, last=last, every=apart * every)]
                for last, apart in place.windows
            },
        }
        for number, place in enumerate(found)
    }
    cases = measured(lab, wanted)
    rows = []
    for number, place in enumerate(found):
        basis = Grams(run=place.run, every=every).basis(lab.home, place.at, place.phase_start)
        for last, apart in place.windows:
            newest = len(basis.steps_M) - 1
            known = basis.window(range(newest - apart * (last - 1), newest + 1, apart))
            if known is None:
                continue  # the log is too short, and the command would say so
            gain = cases[number].gain(LAST, _name(last, apart))
            rows.append(
                {
                    "place": number,
                    "run": place.cluster,
                    "size": place.size.removeprefix(f"{place.family}-"),
                    "architecture": "mixture" if place.family == MIXTURE else "dense",
                    "rate": place.rate,
                    "stage": place.stage,
                    "step": place.at,
                    "last": last,
                    "every": apart * every,
                    "gain": _short(gain["value"]),
                    "error": _short(gain["standard_error"]),
                    "evidence": {key: _short(value) for key, value in asdict(known).items()},
                }
            )
    return {
        "loss_characters": loss_characters(lab.preset),
        "tokens_a_step": lab.preset.sizes[0].recipe.tokens_a_step,
        "rows": rows,
        **diagnose_judging.judged(rows),
    }


def _name(last: int, apart: int) -> str:
    return f"N={last} V={apart}"


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def draw(results: dict[str, Any]) -> Any:
    """Measured gain over predicted gain, each predicted by constants of runs at other rates; on the line they
    are equal.
    """
    predicted = results["predicted"][DIAGNOSIS][GROUPINGS[-1]]
    points = [
        {"panel": row["stage"], "x": x, "y": row["gain"], "model": f"{row['architecture']}, {row['size']}"}
        for row, x in zip(results["rows"], predicted, strict=True)
    ]
    return charts.agreement(points, x="predicted gain over last, nats", y="measured gain over last, nats")
