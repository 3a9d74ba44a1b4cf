"""A day of a watch in minutes: 5,000 checkpoints land and are rotated away, and now and then the trainer
crashes and goes back. Neither memory, nor open files, nor the work for each of them grows.
"""

import gc
import os
import random
import shutil
import statistics
import time
from pathlib import Path

from pma.trajectory import KEPT_FOLDER
from pma.watch import Keeper, Wanted
from pma.watch.outlets import TensorBoard
from pma.watch.page_file import PageFile

from ..watch.fakes import land, settle, watching

LANDINGS = 5_000
BLOCK = 500
_SAVED = 3


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_mib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Trainer:
    """Saves every 10 steps, keeps the newest three, logs a loss of its own in each of its lives."""

    def __init__(self, run: Path, chance: random.Random) -> None:
        self.run, self.chance, self.step, self.life = run, chance, 0, 0
        self.logged: dict[int, float] = {}
        self.saved: list[int] = []

    def crash(self) -> None:
        """Go back to a checkpoint that is there; later ones stay until they are written over, or removed."""
        self.step, self.life = self.chance.choice(self.saved), self.life + 1
        self.logged = {step: loss for step, loss in self.logged.items() if step <= self.step}

    def save(self) -> None:
        self.step += 10
        self.logged[self.step] = 10 / (1 + self.step / 1000) + self.life / 1e6
        self.logged.pop(self.step - 1000, None)
        land(self.run, self.step, self.logged[self.step], logged=self.logged, entries=50)
        self.saved = [step for step in self.saved if step != self.step] + [self.step]
        for step in self.saved[:-_SAVED]:
            shutil.rmtree(self.run / f"checkpoint-{step}")
        self.saved = self.saved[-_SAVED:]


def test_a_day_of_landings(quick_folder: Path, chance: random.Random) -> None:
    run = quick_folder / "run"
    run.mkdir()
    trainer = Trainer(run, chance)
    watch = watching(
        run,
        Wanted(last=5),
        keeper=Keeper(run, run / KEPT_FOLDER),
        page=PageFile(run),
        clock=time.monotonic,
        outlets=[TensorBoard(run / "tensorboard")],
    )
    seconds: list[float] = []
    measured: list[tuple[int, float, float]] = []  # open files, MiB, CPU milliseconds a landing, by block
    for number in range(1, LANDINGS + 1):
        if trainer.saved and chance.random() < 0.01:
            trainer.crash()
        trainer.save()
        started = time.process_time()
        settle(watch)
        seconds.append(time.process_time() - started)
        assert watch.history.alive[-1].step == trainer.step, watch.notes[-3:]
        watch.added.clear()
        if number % BLOCK == 0:
            typical = statistics.median(seconds[-BLOCK:])
            measured.append((open_files(), resident_mib(), 1000 * typical))
            print(f"{number}: {measured[-1]}")
    (files, mib, _), (files_at_end, mib_at_end, _) = measured[1], measured[-1]
    assert files_at_end <= files + 1
    # points themselves are kept: about two kilobytes each
    assert mib_at_end - mib < 24
    early, late = (
        statistics.median(m[2] for m in measured[1:4]),
        statistics.median(m[2] for m in measured[-3:]),
    )
    assert late < 2 * early
    assert len(watch.history) == LANDINGS
    steps = [point.step for point in watch.history.alive]
    assert steps == list(range(10, trainer.step + 1, 10))
    assert trainer.life > 10
    watch.close()
    again = watching(run, Wanted(last=5))
    assert again.history.alive == watch.history.alive
    assert again.history.abandoned == watch.history.abandoned
