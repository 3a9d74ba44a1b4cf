"""The watch: look, evaluate what has landed, newest first, and tell; for ever, or once."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pma.errors import FormatError, IncompleteError, InputError, SpaceError, StorageError
from pma.quantities import Tokens
from pma.results import Store
from pma.trajectory import Growing, Look, Trajectory, TrajectoryPoint
from pma.trajectory.growing import Stamp
from pma.watch.keeping import Keeper
from pma.watch.landing import Judge, Wanted, evaluated, settings_key, window_at
from pma.watch.outlets import Outlet
from pma.watch.points import History, Point, left_behind

# a checkpoint that failed is tried again: the storage may have been at fault, or the trainer half-way
_MOST_ATTEMPTS = 3
_RETRY_SECONDS = 30.0
_NOTES_KEPT = 20
_PAGE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class State:
    """What a page or a status line shows. `live`: whether more may come."""

    run: Path
    wanted: Wanted
    points: Sequence[Point]
    abandoned: Sequence[Point]
    checkpoints: int
    waiting: Sequence[tuple[Path, str]]
    notes: Sequence[str]
    live: bool


class Page(Protocol):
    """Shows the whole state, anew each time."""

    def show(self, state: State) -> None:
        """Show it."""


@dataclass
class _Failure:
    attempts: int
    again_at: float


class Watch:
    """A watch over the run that `growing` lists. `each`: evaluate each so-many-th checkpoint.

    `say` hears of what people should know, `told` of each point. `added`: the points it made. `unfinished`:
    what was to be evaluated was removed or changed meanwhile; look again soon. `last_error`: why a checkpoint
    was not evaluated.
    """

    def __init__(
        self,
        growing: Growing,
        wanted: Wanted,
        judge: Judge,
        store: Store,
        *,
        each: int = 1,
        keeper: Keeper | None = None,
        outlets: Sequence[Outlet] = (),
        page: Page | None = None,
        say: Callable[[str], None] = lambda text: None,
        told: Callable[[Point], None] = lambda point: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.growing, self.wanted, self.judge, self.store = growing, wanted, judge, store
        self.each, self.keeper, self.outlets, self.page = each, keeper, outlets, page
        self.say, self.told, self.clock = say, told, clock
        self.history = History(store, settings_key(wanted, judge))
        self.added: list[Point] = []
        self.notes: list[str] = []
        self.unfinished = False
        self.last_error: InputError | None = None
        self._due: dict[Path, TrajectoryPoint] = {}
        self._since = each - 1  # the first is one of those that are evaluated
        self._failures: dict[Path, _Failure] = {}
        self._said: set[tuple[Path, str]] = set()
        self._looked = Look(trajectory=Trajectory(points=()))
        self._may_have_gone_back = True  # while nobody watched
        self._changed, self._shown_at = True, -math.inf

    def look(self) -> bool:
        """Look once and evaluate at most one checkpoint; whether there is another to evaluate at once."""
        looked = self._looked = self.growing.look()
        self._note_waiting(looked)
        self._may_have_gone_back |= looked.went_back
        self._keep(looked)
        self._take(looked)
        point = self._next()
        self.unfinished = False
        if point is not None:
            self._evaluate(looked.trajectory, point)
        self._show()
        return self._next() is not None and not self.unfinished

    def state(self, *, live: bool) -> State:
        """What there is to show."""
        looked = self._looked
        return State(
            run=self.growing.run,
            wanted=self.wanted,
            points=self.history.alive,
            abandoned=self.history.abandoned,
            checkpoints=len(looked.trajectory.points),
            waiting=looked.waiting,
            notes=tuple(self.notes),
            live=live,
        )

    def _show(self) -> None:
        """Write the page where there is news; at a later look, if it was written just now."""
        if self.page is None or not self._changed or self.clock() < self._shown_at + _PAGE_SECONDS:
            return
        self.page.show(self.state(live=True))
        self._changed, self._shown_at = False, self.clock()

    def close(self) -> None:
        """The watch is over: the page is written a last time, outlets are closed."""
        if self.page is not None:
            self.page.show(self.state(live=False))
        for outlet in self.outlets:
            outlet.close()

    # ---- what there is to do ----

    def _take(self, looked: Look) -> None:
        """Put what landed among what is due, each so-many-th; forget what is gone."""
        there = {point.path: point for point in looked.trajectory.points}
        for point in looked.landed:
            self._failures.pop(point.path, None)
            if self.history.has(point.path.name, self.growing.mark(point.path)):
                self._since = 0
                continue
            self._since += 1
            if self._since >= self.each:
                self._since = 0
                self._due[point.path] = point
        for path in [path for path in self._due if path not in there]:
            del self._due[path]
            if self.growing.run in path.parents and not path.exists():
                self._note(f"{path.name} was gone before it could be evaluated")
        self._due = {path: there[path] for path in self._due}

    def _next(self) -> TrajectoryPoint | None:
        """The newest that is due: what lands must not wait for what was there before."""
        ready = [point for path, point in self._due.items() if self._may_try(path)]
        return max(ready, key=lambda point: point.step or 0, default=None)

    def _may_try(self, path: Path) -> bool:
        failure = self._failures.get(path)
        return failure is None or (failure.attempts < _MOST_ATTEMPTS and self.clock() >= failure.again_at)

    def _keep(self, looked: Look) -> None:
        points = looked.trajectory.points
        if self.keeper is not None and points and (looked.landed or looked.went_back):
            for problem in self.keeper.keep(_in_windows_to_come(points, self.wanted)):
                self._note(problem)

    # ---- one checkpoint ----

    def _evaluate(self, found: Trajectory, point: TrajectoryPoint) -> None:
        stamps = {p.path: self.growing.stamp(p.path) for p in window_at(found, _step(point), self.wanted)[0]}
        try:
            made = self._evaluated(found, point, self.wanted)
        except InputError as error:
            self.unfinished = self._rejected(stamps, error)
            if not self.unfinished:
                self._failed(found, point, error)
            return
        self._done(point, made)

    def _evaluated(self, found: Trajectory, point: TrajectoryPoint, wanted: Wanted) -> Point | None:
        """The point of a checkpoint; None where one of equal content has a point already."""
        mark = self.growing.mark(point.path)
        known = self.history.has_content
        made = evaluated(found, point, wanted, self.judge, self.store, mark=mark, known=known)
        if made is None:
            self.history.same(point.path.name, mark)
            return None
        if found.points[-1].step != made.step or not self._may_have_gone_back:
            return made
        self._may_have_gone_back = False
        dead = left_behind(self.history.alive, made.step, made.key, found.log)
        if dead:
            steps = ", ".join(str(p.step) for p in dead[:5]) + (" …" if len(dead) > 5 else "")
            self._note(f"the trainer went back: step {made.step} is of another lineage than {steps}")
        return replace(made, abandons=tuple(p.key for p in dead))

    def _done(self, point: TrajectoryPoint, made: Point | None) -> None:
        self._failures.pop(point.path, None)
        del self._due[point.path]
        if made is None:
            return
        self.history.add(made)
        self.added.append(made)
        for outlet in self.outlets:
            if made.abandons:
                outlet.went_back(made.step)
            outlet.add(made)
        if made.note is not None:
            self._note(f"step {made.step}: {made.note}")
        self.told(made)
        self._changed = True

    def _rejected(self, stamps: Mapping[Path, Stamp | None], error: InputError) -> bool:
        """Whether checkpoints were removed, cut short or changed while they were read: they are left out
        until they are as a trainer leaves them, and the next look evaluates what can be.
        """
        unreadable = isinstance(error, IncompleteError | FormatError)
        rejected = [
            path
            for path in stamps
            if self.growing.stamp(path) != stamps[path] or (unreadable and _names(error, path))
        ]
        for path in rejected:
            self._note(f"{path.name} is left out, as it vanished or is not whole: {error}")
            self.growing.reject(path, f"incomplete: {error}", stamps[path])
            if path in self._due:
                self._since = self.each - 1  # it is due again when it is complete
        return bool(rejected)

    def _failed(self, found: Trajectory, point: TrajectoryPoint, error: InputError) -> None:
        """The merge, or the checkpoint itself, cannot be evaluated as it is."""
        passing = isinstance(error, SpaceError | StorageError)
        if not passing:
            try:
                made = self._evaluated(found, point, replace(self.wanted, last=1))
            except InputError as its_own:
                error = its_own
            else:
                self._done(point, made and replace(made, note=f"no merge: {error}"))
                return
        if type(error) is InputError and not len(self.history):
            raise error  # the text, the configuration: it will be the same with every checkpoint
        before = self._failures.get(point.path)
        attempts = 1 if passing or before is None else before.attempts + 1
        wait = _RETRY_SECONDS * attempts
        self._failures[point.path] = _Failure(attempts, self.clock() + wait)
        given_up = attempts >= _MOST_ATTEMPTS
        then = "given up" if given_up else f"tried again in {wait:.0f} s"
        self._note(f"step {point.step} was not evaluated ({then}): {error}")
        self.last_error = error
        if given_up:
            del self._due[point.path]

    # ---- words ----

    def _note_waiting(self, looked: Look) -> None:
        there = set(looked.waiting)
        for path, reason in looked.waiting:
            if (path, reason) not in self._said:
                self.say(f"not taken: {path}: {reason}")
        self._changed |= there != self._said or bool(looked.landed)
        self._said = there

    def _note(self, text: str) -> None:
        self.say(text)
        self._changed = True
        self.notes = [*self.notes, text][-_NOTES_KEPT:]


def run(
    watch: Watch, *, poll_seconds: float, once: bool, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Watch until interrupted, or `once` until nothing is left to do now; whether it was interrupted.

    What is evaluated is in the store at once, so that an interrupt loses only the evaluation under way.
    """
    try:
        try:
            while True:
                if watch.look():
                    continue
                if once and not watch.unfinished:
                    return False
                sleep(poll_seconds)
        except KeyboardInterrupt:
            return True
    finally:
        watch.close()


def _in_windows_to_come(points: Sequence[TrajectoryPoint], wanted: Wanted) -> Sequence[TrajectoryPoint]:
    """What this window or a later one may need: with a distance, also those that lie between."""
    if wanted.every is None:
        return points[-wanted.last :]
    in_tokens = isinstance(wanted.every, Tokens)
    places = [(p.tokens if in_tokens else p.step) or 0 for p in points]
    # a window takes what is within a quarter of the distance
    first = places[-1] - (wanted.last - 1) * wanted.every.count - wanted.every.count // 4
    return [point for point, place in zip(points, places, strict=True) if place >= first]


def _names(error: InputError, path: Path) -> bool:
    """Whether an error's message is about `path`, and not about one whose name only begins so."""
    return re.search(re.escape(str(path)) + r"(?![\w-])", str(error)) is not None


def _step(point: TrajectoryPoint) -> int:
    assert point.step is not None, "what does not say its step is not in a trajectory of a run"
    return point.step
