"""The laboratory: where studies keep their runs and results, how many run at once, and how models are
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pma.studies import making, measuring
from pma.studies.data import Data
from pma.studies.making import Made
from pma.studies.measuring import Measured, Reading
from pma.studies.presets import Preset
from pma.studies.workers import pool

HELD_OUT, VALIDATION = "held_out", "validation"


@dataclass(kw_only=True)
class Lab:
    """`home`: where runs and results are kept. `deadline`: of time.time(), past which work stops and can be
    gone on with.
    """

    home: Path
    preset: Preset
    data: Data
    seeds: tuple[int, ...]
    jobs: int = 1
    deadline: float | None = None
    say: Callable[[str], None] = lambda text: None
    used: dict[Path, float] = field(default_factory=dict)

    def make(self, wanted: Iterable[Made]) -> None:
        """Make these and what they need, as many at once as `jobs`."""
        waiting: dict[Path, Made] = {}
        for made in wanted:
            self._collect(made, waiting)
        todo = {path: made for path, made in waiting.items() if making.seconds(made, self.home) is None}
        tasks = {
            path: (made, {need.folder(self.home) for need in made.needs()}) for path, made in todo.items()
        }
        self._run_all(tasks)
        for path, made in waiting.items():
            self.used[path] = making.seconds(made, self.home) or 0.0

    def _collect(self, made: Made, into: dict[Path, Made]) -> None:
        for need in made.needs():
            self._collect(need, into)
        into.setdefault(made.folder(self.home), made)

    def _run_all(self, tasks: dict[Path, tuple[Made, set[Path]]]) -> None:
        if not tasks:
            return
        total, done = len(tasks), 0
        with pool(self.jobs) as workers:
            running: dict[Future[None], Path] = {}
            while tasks or running:
                pending = {*tasks, *running.values()}
                for path in [path for path, (_, needs) in tasks.items() if not needs & pending]:
                    made, _ = tasks.pop(path)
                    running[workers.submit(making.ensure, made, self.home, self.deadline)] = path
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    done += 1
                    self.say(f"made {done} of {total}: {running.pop(future).name}")

    def measure(
        self, wanted: Sequence[Measured], *, where: str = HELD_OUT, cloze: int = 400, tasks: bool = False
    ) -> list[Reading]:
        """What each scored on the held-out (or validation) text of its run, and on the preset's tasks."""
        self.make({item.run for item in wanted})
        how = measuring.How(
            where=where,
            cloze=cloze,
            characters_a_document=self.preset.characters_a_document,
            tasks=self.data.tasks if tasks else (),
            task_items=self.preset.task_items,
        )
        missing = [item for item in wanted if measuring.known(item, how, self.home) is None]
        if missing:
            with pool(self.jobs) as workers:
                # neighbours share a run, so a worker's parts are contiguous
                futures = [
                    workers.submit(measuring.measure, item, how, self.home, self.deadline) for item in missing
                ]
                for number, future in enumerate(futures, 1):
                    future.result()
                    if number % 10 == 0 or number == len(futures):
                        self.say(f"measured {number} of {len(futures)}")
        readings = [measuring.known(item, how, self.home) for item in wanted]
        return [reading for reading in readings if reading is not None]

    def map(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`function` of each of `arguments`, as many at once as `jobs`; all must be importable by name."""
        with pool(self.jobs) as workers:
            return [future.result() for future in [workers.submit(function, *each) for each in arguments]]
