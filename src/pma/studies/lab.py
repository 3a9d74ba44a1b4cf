"""The laboratory: where studies keep their runs and results, how many run at once, and how models are
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pma.studies import making, measuring
from pma.studies.data import Data
from pma.studies.making import Made
from pma.studies.measuring import Measured, Reading
from pma.studies.presets import Preset

HELD_OUT, VALIDATION = "held_out", "validation"


@dataclass(kw_only=True)
class Lab:
    """`home`: where runs and results are kept. `workers`: processes that train and measure, of
    `pma.studies.workers.pool`. `deadline`: of time.time(), past which work stops and can be gone on with.
    """

    home: Path
    preset: Preset
    data: Data
    seeds: tuple[int, ...]
    workers: Executor
    deadline: float | None = None
    say: Callable[[str], None] = lambda text: None
    used: dict[Path, float] = field(default_factory=dict)

    def make(self, wanted: Iterable[Made]) -> None:
        """Make these and what they need, side by side."""
        all_of_it: dict[Path, Made] = {}
        for made in wanted:
            self._collect(made, all_of_it)
        self._run([made for made in all_of_it.values() if making.seconds(made, self.home) is None])
        for path, made in all_of_it.items():
            self.used[path] = making.seconds(made, self.home) or 0.0

    def _collect(self, made: Made, into: dict[Path, Made]) -> None:
        for need in made.needs():
            self._collect(need, into)
        into.setdefault(made.folder(self.home), made)

    def _run(self, missing: Sequence[Made]) -> None:
        """Each as soon as what it needs is there."""
        waiting, running = list(missing), dict[Future[None], Made]()
        while waiting or running:
            unmade = {made.folder(self.home) for made in (*waiting, *running.values())}
            ready = [m for m in waiting if not unmade & {need.folder(self.home) for need in m.needs()}]
            for made in ready:
                waiting.remove(made)
                running[self.workers.submit(making.ensure, made, self.home, self.deadline)] = made
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                made = running.pop(future)
                done = len(missing) - len(waiting) - len(running)
                self.say(f"made {done} of {len(missing)}: {made.title}")

    def measure(
        self,
        wanted: Sequence[Measured],
        *,
        where: str = HELD_OUT,
        cloze: int = 400,
        tasks: bool = False,
        characters_a_document: int | None = None,
        of: Made | None = None,
    ) -> list[Reading]:
        """What each scored on the held-out (or validation) text of its run, or on that of the run or text
        `of`, of which so much of each document is read (the preset's by default), and on the preset's tasks.
        """
        self.make({item.run for item in wanted} | ({of} if of else set()))
        how = measuring.How(
            where=where,
            cloze=cloze,
            characters_a_document=characters_a_document or self.preset.characters_a_document,
            tasks=self.data.tasks if tasks else (),
            task_items=self.preset.task_items,
            of=of.folder(self.home) if of else None,
        )
        missing = [item for item in wanted if measuring.known(item, how, self.home) is None]
        futures = [
            self.workers.submit(measuring.measure, item, how, self.home, self.deadline) for item in missing
        ]
        for number, future in enumerate(futures, 1):
            future.result()
            if number % 10 == 0 or number == len(futures):
                self.say(f"measured {number} of {len(futures)}")
        readings = [measuring.known(item, how, self.home) for item in wanted]
        found = [reading for reading in readings if reading is not None]
        assert len(found) == len(wanted)
        return found

    def map(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`function` of each of `arguments`, side by side; all must be importable by name."""
        futures = [self.workers.submit(function, *each) for each in arguments]
        return [future.result() for future in futures]
