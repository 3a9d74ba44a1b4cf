"""What annealing would give, forecast from merges: decays that were carried out, forecast without knowing
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pma.errors import InputError
from pma.forecast.calibration import DEFAULT, Calibration, calibrate
from pma.forecast.outlook import outlook
from pma.forecast.probes import ALPHAS, spread_of
from pma.studies import charts
from pma.studies.forecast_baselines import LAST_GAIN, LAW, MERGE_OFFSET, of_law, simple
from pma.studies.forecast_cases import (
    Known,
    Place,
    decays,
    forks,
    known,
    other_shapes,
    places,
    probe_decay,
)
from pma.studies.forecast_telling import FAMILY, GROUP, OWN_FORKS, PROBED, SIZE, tell
from pma.studies.lab import Lab

__all__ = ["VERSION", "draw", "run", "tell"]

VERSION = 1
_LEAVING: dict[str, Callable[[Known], str]] = {
    GROUP: lambda each: each.place.group,
    FAMILY: lambda each: each.place.size.family,
    SIZE: lambda each: each.place.size.name.split("-")[1],
}


def run(lab: Lab) -> dict[str, Any]:
    """Every decay of every run, forecast by calibrations that leave its group out."""
    at, refused = places(lab)
    done = known(lab, at, decays(lab.preset))
    usable, more = _usable(done)
    tuned = _of_all_seeds(lab, at)
    probes = known(lab, tuned, [probe_decay(lab.preset)])
    middle = [each for each in tuned if each.size.name in lab.preset.middle]
    shaped = [each for each in middle if each.from_step in forks(lab.preset)[1::2]]
    shaped_done, _ = _usable(known(lab, shaped, other_shapes(lab.preset)))
    rules = {**simple(usable), LAW: of_law(lab, usable)} if usable else {}
    taught = [*usable, *_usable(probes)[0]]
    merges = {name: _leave_out(usable, taught, by) for name, by in _LEAVING.items()}
    with_own = {
        OWN_FORKS: _leave_out(usable, taught, _LEAVING[GROUP], own=_earlier(usable)),
        PROBED: _leave_out(usable, taught, _LEAVING[GROUP], own=_probed(probes)),
    }
    return {
        "anneal_steps": lab.preset.anneal_steps,
        "probe_steps": probe_decay(lab.preset).steps,
        "every_steps": lab.preset.every_steps,
        "cases": [_described(each) for each in usable],
        "refused": [*refused, *more],
        "rules": rules,
        "merges": merges,
        "own": with_own,
        "shapes": {
            "cases": [_described(each) for each in shaped_done],
            "merges": _leave_out(shaped_done, taught, _LEAVING[GROUP]),
        },
        "calibration": _calibration(taught),
    }


def _of_all_seeds(lab: Lab, at: Sequence[Place]) -> list[Place]:
    """The places in runs of which there is one of every seed."""
    runs: dict[str, set[str]] = {}
    for each in at:
        runs.setdefault(each.group, set()).add(each.run)
    return [each for each in at if len(runs[each.group]) == len(lab.seeds)]


def _usable(done: Sequence[Known]) -> tuple[list[Known], list[str]]:
    """The decays that merges say anything of, and why they do not of others."""
    found, refused = [], []
    for each in done:
        try:
            spread_of(each.place.probes, each.place.from_step, alphas=ALPHAS[:1], draws=0)
        except InputError as error:
            refused.append(f"{each.place.run} at step {each.place.from_step}: {error}")
        else:
            found.append(each)
    return found, list(dict.fromkeys(refused))


def _leave_out(
    targets: Sequence[Known],
    all_known: Sequence[Known],
    by: Callable[[Known], str],
    own: Callable[[Known], Sequence[Known]] | None = None,
) -> list[dict[str, Any] | None]:
    """Each target's forecast by a calibration of those that `by` calls otherwise. `own`: decays of the run
    itself that the forecast may know; None where it has none.
    """
    found: list[dict[str, Any] | None] = [None] * len(targets)
    for key in sorted({by(each) for each in targets}):
        rest = [each.case for each in all_known if by(each) != key]
        try:
            learned = calibrate(rest, name="", what="")
        except InputError:
            continue
        for i, each in enumerate(targets):
            mine = own(each) if own is not None else ()
            if by(each) == key and (own is None or mine):
                found[i] = _forecast(each, learned, mine)
    return found


def _forecast(each: Known, learned: Calibration, mine: Sequence[Known]) -> dict[str, Any]:
    place = each.place
    made = outlook(place.probes, place.from_step, each.decay, learned, [known.case for known in mine])
    (low80, high80), (low95, high95) = made.intervals[0.80], made.intervals[0.95]
    return {
        "loss": made.loss,
        "interval80": [low80, high80],
        "interval95": [low95, high95],
        "gain": made.gain,
        "told": made.told,
        "widened": len(made.widened),
    }


def _earlier(usable: Sequence[Known]) -> Callable[[Known], Sequence[Known]]:
    def earlier(each: Known) -> list[Known]:
        place = each.place
        mine = [other for other in usable if other.place.run == place.run]
        return [other for other in mine if other.place.from_step < place.from_step]

    return earlier


def _probed(probes: Sequence[Known]) -> Callable[[Known], Sequence[Known]]:
    by_place = {(each.place.run, each.place.from_step): [each] for each in probes}
    return lambda each: by_place.get((each.place.run, each.place.from_step), [])


def _described(each: Known) -> dict[str, Any]:
    place = each.place
    return {
        "run": place.run,
        "group": place.group,
        "size": place.size.name,
        "rate": place.rate,
        "from_step": place.from_step,
        "shape": each.decay.shape,
        "steps": each.decay.steps,
        "loss": each.loss,
    }


def _calibration(taught: Sequence[Known]) -> dict[str, Any] | None:
    """Of all of them: what the package keeps."""
    groups = sorted({each.place.size.name for each in taught})
    steps = sorted({each.decay.steps for each in taught})
    ends = sorted({each.place.from_step for each in taught})
    what = (
        f"{len({each.place.run for each in taught})} runs of {', '.join(groups)}; cosine decays of "
        f"{', '.join(map(str, steps))} steps from steps {', '.join(map(str, ends))}"
    )
    try:
        return calibrate([each.case for each in taught], name=DEFAULT, what=what).to_json()
    except InputError:
        return None


def draw(results: dict[str, Any]) -> Any:
    """The loss after each decay over what was forecast: from merges, and by three rules."""
    forecasts = {"merges, size and rate left out": results["merges"][GROUP]}
    forecasts |= {name: results["rules"].get(name, []) for name in (MERGE_OFFSET, LAST_GAIN, LAW)}
    points = [
        {"panel": name, "x": row["loss"] if isinstance(row, dict) else row, "y": case["loss"]}
        | {"model": case["size"]}
        for name, rows in forecasts.items()
        for row, case in zip(rows, results["cases"], strict=True)
        if row is not None
    ]
    return charts.agreement(points, x="forecast, nats a token", y="loss after the decay, nats a token")
