"""Later stages of training, from a raw checkpoint or from a merge of a trunk: texts, runs, their curves."""

# S seeds, T steps

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pma.logs import read
from pma.logs.curves import Quantity
from pma.pretraining import further, instructions, run_folder
from pma.pretraining.recipe import CONSTANT
from pma.studies.data import Text
from pma.studies.lab import Lab
from pma.studies.making import OPTIMIZER_FILE, Made, Merged, Prepared, Run, Trunk, stopping
from pma.studies.measuring import Measured

LAST, MERGE = "last", "merge"  # what a stage starts from
CURVE_POINTS = 24


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warmup, then from the peak rate to the final one by `shape`."""

    name: str
    peak: float
    final: float
    shape: str = "cosine"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def constant(name: str, rate: float) -> Schedule:
    """A schedule that stays at its rate."""
    return Schedule(name=name, peak=rate, final=rate, shape=CONSTANT)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageText(Made):
    """Another text, or rows of prompts and responses, prepared once in the tokens of a trunk's text."""

    kind: ClassVar[str] = "stage-text"
    trunk: Trunk
    text: Text
    instructions: bool

    @property
    def title(self) -> str:
        return "rows of prompts and responses" if self.instructions else "text of another domain"

    def describe(self) -> dict[str, Any]:
        context = self.trunk.recipe.text.context_tokens if self.instructions else None
        return {"tokens": self._tokens().describe(), "text": self.text.digest, "rows_up_to": context}

    def needs(self) -> Sequence[Made]:
        return (self._tokens(),)

    def _tokens(self) -> Prepared:
        return Prepared(recipe=self.trunk.recipe, text=self.trunk.text)

    def make(self, folder: Path, home: Path) -> None:
        from transformers import AutoTokenizer

        folder.mkdir(exist_ok=True)
        text = self._tokens().folder(home) / run_folder.TEXT_FOLDER
        tokenizer = AutoTokenizer.from_pretrained(text, local_files_only=True)
        recipe = self.trunk.recipe
        if self.instructions:
            instructions.prepare(folder, self.text.names, tokenizer, recipe.text.context_tokens)
        else:
            run_folder.prepare_text(folder, recipe, self.text.names, tokenizer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage(Run):
    """A stage of `steps` on `text` that starts from the trunk's checkpoint of step `at`, or from the merge of
    the `last` up to it, `every` steps apart; a checkpoint each `checkpoint_steps`.
    """

    kind: ClassVar[str] = "stage"
    trunk: Trunk
    at: int
    last: int
    every: int
    text: StageText
    schedule: Schedule
    steps: int
    warmup_steps: int
    checkpoint_steps: int

    @property
    def title(self) -> str:
        start = MERGE if self.last > 1 else LAST
        return f"{self.trunk.title}, then {self.text.title} from {start}, {self.schedule.name}"

    def describe(self) -> dict[str, Any]:
        return {
            "trunk": self.trunk.describe(),
            "start": [self.at, self.last, self.every if self.last > 1 else None],
            "text": self.text.describe(),
            "schedule": [self.schedule.peak, self.schedule.final, self.schedule.shape],
            "steps": [self.steps, self.warmup_steps, self.checkpoint_steps],
        }

    def needs(self) -> Sequence[Made]:
        return (self.trunk if self.last == 1 else self._merged(), self.text)

    def _merged(self) -> Merged:
        return Merged(run=self.trunk, last=self.last, every=self.every, at=self.at, purpose="ct")

    def make(self, folder: Path, home: Path) -> None:
        start = self._merged().folder(home) if self.last > 1 else self.trunk.checkpoint(home, self.at)
        a_step = self.trunk.recipe.tokens_a_step
        names = list(self.text.text.names)
        further(
            start,
            folder,
            text=[] if self.text.instructions else names,
            instructions=names if self.text.instructions else [],
            tokens=self.steps * a_step,
            learning_rate=self.schedule.peak,
            final_learning_rate=self.schedule.final,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule.shape,
            checkpoint_every=self.checkpoint_steps * a_step,
            interval_means=False,
            prepared=self.text.folder(home),
            progress=stopping,
        )
        for checkpoint in folder.glob("checkpoint-*"):
            (checkpoint / OPTIMIZER_FILE).unlink(missing_ok=True)


def stage(lab: Lab, trunk: Trunk, start: str, text: StageText, schedule: Schedule) -> Stage:
    """A stage of the preset's length from the end of the trunk: from LAST or from MERGE, the preset's usual
    window.
    """
    preset = lab.preset
    return Stage(
        trunk=trunk,
        at=preset.steps,
        last=preset.last if start == MERGE else 1,
        every=preset.every_steps,
        text=text,
        schedule=schedule,
        steps=preset.stage_steps,
        warmup_steps=preset.stage_steps // 20,
        checkpoint_steps=preset.every_steps,
    )


def begun(run: Stage) -> Measured:
    """The model that a stage starts from."""
    return Measured(run=run.trunk, at=run.at, last=run.last, every=run.every)


def moments(lab: Lab) -> list[int]:
    """Steps of a stage at which its model is looked at: its start, 0; soon after; a third of it; its end."""
    every, end = lab.preset.every_steps, lab.preset.stage_steps
    return sorted({step // every * every for step in (0, every, end // 3, end)})


def at_moment(run: Stage, step: int) -> Measured:
    """The model of a stage after so many steps."""
    return begun(run) if step == 0 else Measured(run=run, at=step)


def logged(lab: Lab, run: Stage, what: Quantity) -> NDArray[np.float64]:
    """What the Trainer logged at each step, shape (T,)."""
    steps_T, value_T = read(run.checkpoint(lab.home, run.steps)).series(what)
    assert steps_T.tolist() == list(range(1, run.steps + 1))
    return value_T


def curve(value_T: NDArray[np.float64]) -> list[dict[str, float]]:
    """Means over stretches of steps, by the middle of each."""
    stretches = np.array_split(np.arange(len(value_T)), min(CURVE_POINTS, len(value_T)))
    return [{"step": float(each.mean()) + 1, "value": float(value_T[each].mean())} for each in stretches]
