"""One checkpoint that has landed: its window, and what the raw checkpoint and the merge are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pma import averaging, sweeping, trajectory
from pma.engine import MergeOptions
from pma.errors import UsageError
from pma.evaluation.measures import Measure
from pma.quantities import Steps, Tokens
from pma.results import Store, content_key
from pma.sweeping import Grid, Load
from pma.trajectory import Trajectory, TrajectoryPoint, Window
from pma.watch.points import Point, newest_logged

# what a point calls it; what a row of a sweep calls it, its error, its gain and the gain's error; the gain
_MEASURED = (
    ("loss", "loss", "standard_error", "gain", "gain_standard_error", "gain"),
    (
        "score",
        "mean_score",
        "mean_score_standard_error",
        "mean_score_gain",
        "mean_score_gain_standard_error",
        "score_gain",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is evaluated at each checkpoint: the merge of up to `last`, `every` so far apart, by `scheme`."""

    last: int = 10
    every: Steps | Tokens | None = None
    scheme: str = "sma"
    allow_mixed_phases: bool = False
    options: MergeOptions = field(default_factory=MergeOptions)

    def __post_init__(self) -> None:
        Window(last=self.last)  # refuses what is no window
        averaging.scheme(self.scheme)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How models are evaluated. `weights`: of the tasks among `measures`. `load`: as for `sweeping.evaluate`;
    by default a transformers model.
    """

    measures: Sequence[Measure]
    weights: Mapping[str, float] = field(default_factory=dict)
    context_tokens: int | None = None
    load: Load | None = None


def settings_key(wanted: Wanted, judge: Judge) -> str:
    """The same for two watches whose points belong on one chart."""
    return content_key(
        {
            "watch": 1,
            "last": wanted.last,
            "every": None if wanted.every is None else [type(wanted.every).__name__, wanted.every.count],
            "scheme": wanted.scheme,
            "allow_mixed_phases": wanted.allow_mixed_phases,
            "measures": sorted(measure.key for measure in judge.measures),
            "weights": dict(judge.weights),
        }
    )


def window_at(found: Trajectory, step: int, wanted: Wanted) -> tuple[tuple[TrajectoryPoint, ...], str | None]:
    """The longest window that ends at `step` with at most `wanted.last` checkpoints and crosses no phases;
    and why it is shorter, if it is. Of one checkpoint it is no merge.
    """
    full = Window(last=wanted.last, every=wanted.every, at=step, allow_mixed_phases=wanted.allow_mixed_phases)
    for last in range(wanted.last, 1, -1):
        window = _selected(found, replace(full, last=last))
        if window is not None:
            return window, None if last == wanted.last else _why_shorter(found, full, last)
    return trajectory.select(found, Window(last=1, at=step)), _why_shorter(found, full, 1)


def _selected(found: Trajectory, window: Window) -> tuple[TrajectoryPoint, ...] | None:
    try:
        return trajectory.select(found, window)
    except UsageError:
        return None


def _why_shorter(found: Trajectory, full: Window, last: int) -> str:
    one_more = replace(full, last=last + 1, allow_mixed_phases=True)
    if _selected(found, one_more) is not None:
        return "a longer window crosses phases (warmup, decay, or another learning rate)"
    distance = "" if full.every is None else f" {full.every} apart"
    return f"there are no more{distance} before it"


def evaluated(
    found: Trajectory,
    point: TrajectoryPoint,
    wanted: Wanted,
    judge: Judge,
    store: Store,
    *,
    mark: str = "",
    known: Callable[[str], bool] = lambda key: False,
) -> Point | None:
    """Evaluate the checkpoint and the merge of the window that ends with it; what the store has is taken
    from there. None where a checkpoint of this content is `known`.

    Raises InputError where a checkpoint cannot be read or used, or changes while it is read.
    """
    step = point.step
    assert step is not None
    window, why = window_at(found, step, wanted)
    lasts = (1,) if len(window) == 1 else (1, len(window))
    with sweeping.planned_over(found, _grid(lasts, step, wanted), wanted.options) as planned:
        key = planned.keys[planned.raw[step]]
        if known(key):
            return None

        results, _ = sweeping.evaluate(
            planned, judge.measures, store, context_tokens=judge.context_tokens, load=judge.load
        )
        rows = {row["last"]: row for row in sweeping.rows(planned, results, judge.weights)}
    merged = rows[len(window)] if len(window) > 1 else None
    return Point(
        step=step,
        tokens=point.tokens,
        checkpoint=point.path.name,
        mark=mark,
        key=key,
        window=tuple(p.step or 0 for p in window) if merged else (),
        note=_note(len(window), wanted, why),
        values=_values(rows[1], merged),
        logged=newest_logged(found.log, step),
    )


def _grid(lasts: tuple[int, ...], step: int, wanted: Wanted) -> Grid:
    return Grid(
        lasts=lasts,
        everys=(wanted.every,),
        ats=(step,),
        schemes=(wanted.scheme,),
        allow_mixed_phases=wanted.allow_mixed_phases,
    )


def _note(found: int, wanted: Wanted, why: str | None) -> str | None:
    if why is None:
        return None
    return f"no merge: {why}" if found == 1 else f"{found} of {wanted.last} checkpoints: {why}"


def _values(raw: Mapping[str, Any], merged: Mapping[str, Any] | None) -> dict[str, float]:
    """What was measured, by the names that charts and scalars have."""
    values: dict[str, float] = {}
    for kind, own, own_error, theirs, theirs_error, gain in _MEASURED:
        if own not in raw:
            continue
        values |= {f"{kind}_last": raw[own], f"{kind}_last_error": raw[own_error]}
        if merged is not None:
            values |= {f"{kind}_merged": merged[own], f"{kind}_merged_error": merged[own_error]}
            values |= {gain: merged[theirs], f"{gain}_error": merged[theirs_error]}
    return {name: float(value) for name, value in values.items()}
