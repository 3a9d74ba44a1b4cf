"""What a watch has found out: a point for each checkpoint, kept in the store beside the evaluations.

A point is put once and stays. Which points are of a lineage that a restart left behind is said by the later
points that found it out, so that a watch which is started again knows it too.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pma.errors import FormatError, printable
from pma.results import Store
from pma.types import TrainingLog


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One checkpoint and the merge that ends with it.

    `mark`: of its files, see `Growing.mark`. `key`: of the raw checkpoint's content. `window`: steps of the
    merge, empty where there is none; `note` then says why, or why it is shorter than asked for. `values`:
    loss_last, loss_merged and gain (of loss) where there is a text, score_last and so on for tasks; each also
    with _error, its standard error. `logged`: the newest (step, loss) in its log. `abandons`: keys of points
    that turned out to be of a lineage which the run left.
    """

    step: int
    tokens: int | None
    checkpoint: str
    mark: str
    key: str
    window: tuple[int, ...] = ()
    note: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    logged: tuple[int, float] | None = None
    abandons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Point:
        """The inverse of `to_json`. Raises ValueError, LookupError or TypeError for what is none."""
        logged = value["logged"]
        tokens, note = value["tokens"], value["note"]
        return cls(
            step=int(value["step"]),
            tokens=None if tokens is None else int(tokens),
            checkpoint=str(value["checkpoint"]),
            mark=str(value["mark"]),
            key=str(value["key"]),
            window=tuple(map(int, value["window"])),
            note=None if note is None else str(note),
            values={str(name): float(number) for name, number in value["values"].items()},
            logged=None if logged is None else (int(logged[0]), float(logged[1])),
            abandons=tuple(map(str, value["abandons"])),
        )


class History:
    """The points of a watch with these settings (`settings_key`), as the store has them."""

    def __init__(self, store: Store, settings_key: str) -> None:
        self._store, self._settings_key = store, settings_key
        self._points: dict[str, Point] = {}
        self._abandoned: set[str] = set()
        self._marks: set[tuple[str, str]] = set()
        for row in store.rows(settings_key):
            try:
                self._take(Point.from_json(row.result))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise FormatError(
                    f"{store.path} holds a point of a watch that cannot be read ({printable(repr(error))}); "
                    "use another file with --store FILE"
                ) from error

    def __len__(self) -> int:
        return len(self._points)

    @property
    def alive(self) -> list[Point]:
        """Points of the run's lineage, by step."""
        return sorted((p for p in self._points.values() if p.key not in self._abandoned), key=_step)

    @property
    def abandoned(self) -> list[Point]:
        """Points of lineages that restarts left behind, by step."""
        return sorted((p for p in self._points.values() if p.key in self._abandoned), key=_step)

    def has(self, checkpoint: str, mark: str) -> bool:
        """Whether this very writing of a checkpoint has a point."""
        return (checkpoint, mark) in self._marks

    def has_content(self, key: str) -> bool:
        """Whether a checkpoint of this content has a point."""
        return key in self._points

    def same(self, checkpoint: str, mark: str) -> None:
        """Take note that this writing has a point already: it is a copy of one that has."""
        self._marks.add((checkpoint, mark))

    def add(self, point: Point) -> None:
        """Put a point into the store."""
        described = {"watch of": point.checkpoint, "step": point.step}
        self._store.put(point.key, self._settings_key, merge=described, result=point.to_json())
        self._take(point)

    def _take(self, point: Point) -> None:
        self._points[point.key] = point
        self._marks.add((point.checkpoint, point.mark))
        self._abandoned.update(point.abandons)
        self._abandoned.discard(point.key)  # a trainer that comes to the same bits again is on that lineage


def left_behind(alive: Sequence[Point], step: int, key: str, log: TrainingLog) -> list[Point]:
    """Which of `alive` are not of the lineage whose newest checkpoint is that of `step`, `key` and `log`.

    Those further on than the run is now, another of the same step, and those whose log it contradicts.
    """
    theirs = dict(log.losses)
    dead = []
    for point in alive:
        ahead = point.step > step or (point.step == step and point.key != key)
        if ahead or (point.logged is not None and _differs(theirs.get(point.logged[0]), point.logged[1])):
            dead.append(point)
    return dead


def newest_logged(log: TrainingLog, step: int) -> tuple[int, float] | None:
    """The last (step, loss) that was logged up to `step`, where it is a number that can be kept."""
    end = bisect_right(log.losses, step, key=lambda entry: entry[0])
    return log.losses[end - 1] if end and math.isfinite(log.losses[end - 1][1]) else None


def _differs(theirs: float | None, mine: float) -> bool:
    return theirs is not None and theirs != mine


def _step(point: Point) -> int:
    return point.step
