"""Merges evaluated without being written, and their results kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma.engine import Plan
from pma.errors import FormatError, printable
from pma.evaluation.making import Load, Measuring, Wanted, measured
from pma.evaluation.measures import Measure, Result
from pma.remote import RemotePath
from pma.results import STORE_FILE, Store
from pma.sweeping.grid import Sweep

# an Evaluation or a TaskResult by the name of its measure
Results = dict[str, Any]
_WRITE_SECONDS = 2.0


def store_beside(run: Path) -> Path:
    """Where results of a run are kept: in it, or, of a run in a store, in the working folder."""
    return STORE_FILE if isinstance(run, RemotePath) else run / STORE_FILE


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A merge, its key (`merge_key`), and what is to be measured of it."""

    plan: Plan
    key: str
    measures: Sequence[Measure]


def evaluate(
    sweep: Sweep,
    measures: Sequence[Measure],
    store: Store,
    *,
    context_tokens: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
    begin: Callable[[Sequence[Plan]], None] = lambda plans: None,
    load: Load | None = None,
    measuring: Measuring = measured,
) -> tuple[dict[int, Results], int]:
    """Results by plan, of every cell and of the raw checkpoints, each by the measure's name; and how many of
    them were in the store already. The rest as for `evaluate_each`.
    """
    asked = [
        Asked(plan=plan, key=key, measures=measures)
        for plan, key in zip(sweep.plans, sweep.keys, strict=True)
    ]
    done, known = evaluate_each(
        asked,
        store,
        context_tokens=context_tokens,
        announce=announce,
        begin=begin,
        load=load,
        measuring=measuring,
    )
    return dict(enumerate(done)), known


def evaluate_each(
    asked: Sequence[Asked],
    store: Store,
    *,
    context_tokens: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
    begin: Callable[[Sequence[Plan]], None] = lambda plans: None,
    new: Callable[[Result], None] = lambda result: None,
    load: Load | None = None,
    measuring: Measuring = measured,
) -> tuple[list[Results], int]:
    """Results of each, by the measure's name, and how many were in the store already; the merges that lack
    any are made together, by `measuring`. `begin` hears once of their plans, `new` each result that was not
    known. `load`: makes what the measures score, by default `load_scorer`.
    """
    store.prepare()
    done: list[Results] = [{} for _ in asked]
    missing: dict[int, list[Measure]] = {}
    for place, each in enumerate(asked):
        for measure in each.measures:
            known = store.get(each.key, measure.key)
            if known is not None:
                done[place][measure.name] = _read_back(measure, known, store)
            else:
                missing.setdefault(place, []).append(measure)
    places = list(missing)
    keepers = [_Keeper(store, asked[place], len(missing[place])) for place in places]

    def told(number: int, measure: Measure, result: Result) -> None:
        done[places[number]][measure.name] = result
        new(result)
        keepers[number].add(measure.key, result.to_json())

    def begun(number: int) -> None:
        announce(f"evaluating {number + 1} of {len(places)}")
        keepers[number].begin()

    begin([asked[place].plan for place in places])
    wanted = [
        Wanted(plan=asked[place].plan, name=asked[place].key[:12], measures=missing[place])
        for place in places
    ]
    try:
        if places:
            measuring(wanted, told, context_tokens=context_tokens, begun=begun, load=load)
    finally:
        for keeper in keepers:
            keeper.write()  # also what was done before an interrupt
    return done, sum(len(each.measures) for each in asked) - sum(map(len, missing.values()))


class _Keeper:
    """Puts a merge's results into the store, those that come at once together: a write waits for the disk."""

    def __init__(self, store: Store, asked: Asked, to_come: int) -> None:
        self._store, self._asked, self._to_come = store, asked, to_come
        self._results: dict[str, dict[str, Any]] = {}
        self._written_at = time.monotonic()

    def begin(self) -> None:
        """From now on, what comes within seconds is written together."""
        self._written_at = time.monotonic()

    def add(self, key: str, result: dict[str, Any]) -> None:
        self._results[key] = result
        self._to_come -= 1
        if self._to_come == 0 or time.monotonic() - self._written_at > _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        if self._results:
            self._store.put_all(self._asked.key, self._results, merge=_described(self._asked.plan))
        self._results, self._written_at = {}, time.monotonic()


def _read_back(measure: Measure, value: dict[str, Any], store: Store) -> Any:
    """A result from the store, which is a file like any other."""
    try:
        return measure.read(value)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{store.path} holds an evaluation that cannot be read ({printable(repr(error))}); "
            "remove the file, and it is computed again"
        ) from error


def _described(plan: Plan) -> dict[str, Any]:
    sources = [
        {"path": str(source.point.path), "step": source.point.step, "weight": source.weight}
        for source in plan.sources
    ]
    return {"scheme": plan.options.scheme, "use": plan.options.use, "sources": sources}
