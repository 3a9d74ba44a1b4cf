"""Inner products of all checkpoints of a run, made once, and what they tell of any window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pma import logs, verbs
from pma.diagnosis.evidence import Basis
from pma.engine import MergeOptions
from pma.studies.making import Anneal, Made, Trunk
from pma.verbs import Choice

_FILE = "products.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Grams(Made):
    """Of the checkpoints that a run saved itself, `every` steps apart; of a fork those of its decay."""

    kind: ClassVar[str] = "gram"
    run: Trunk | Anneal
    every: int

    @property
    def title(self) -> str:
        return f"inner products of {self.run.title}"

    def describe(self) -> dict[str, Any]:
        return {"run": self.run.describe(), "every": self.every}

    def needs(self) -> Sequence[Made]:
        return (self.run,)

    @property
    def steps(self) -> list[int]:
        """Of its checkpoints, rising."""
        first, last = _span(self.run)
        return list(range(first + self.every, last + 1, self.every))

    def make(self, folder: Path, home: Path) -> None:
        from pma.diagnosis.groups import group_of
        from pma.engine.gram import inner_products

        paths = tuple(self.run.checkpoint(home, step) for step in self.steps)
        choice = Choice(paths=paths, allow_mixed_phases=True)
        with verbs.plan(choice, MergeOptions(threads=1)) as planned:
            found = inner_products(planned, group_of)
        folder.mkdir(exist_ok=True)
        gram_NN, newest_N = found.deviations_GNN.sum(axis=0), found.newest_GN.sum(axis=0)
        np.savez(folder / _FILE, gram_NN=gram_NN, newest_N=newest_N)

    def basis(self, home: Path, at: int, phase_start: int) -> Basis:
        """What a diagnosis at step `at` knows: checkpoints after `phase_start` up to there, and the log."""
        with np.load(self.folder(home) / _FILE) as stored:
            gram_NN, newest_N = stored["gram_NN"], stored["newest_N"]
        steps = self.steps
        end = steps.index(at)
        chosen = [n for n in range(end + 1) if steps[n] > phase_start]
        cross = newest_N[end] if end < len(steps) - 1 else 0.0
        return Basis(
            steps_M=[float(steps[n]) for n in chosen],
            deviations_MM=gram_NN[np.ix_(chosen, chosen)],
            weights=float(np.sqrt(newest_N[-1] + 2 * cross + gram_NN[end, end])),
            curves=logs.read(self.run.checkpoint(home, at) / "trainer_state.json"),
            phase_start=float(phase_start),
        )


def _span(run: Trunk | Anneal) -> tuple[int, int]:
    if isinstance(run, Anneal):
        return run.step, run.step + run.steps
    return 0, run.recipe.run.tokens // run.recipe.tokens_a_step
