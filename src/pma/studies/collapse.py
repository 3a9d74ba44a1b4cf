"""Runs at an exceptionally high learning rate: where they collapse, and what goes on from before.

A collapse is told from the training loss alone, which has nothing to do with the detector (`pma spikes`) that
then has to find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pma import logs, trajectory, verbs
from pma.logs.breakaways import find
from pma.pretraining import Recipe, pretrain, resume, run_folder
from pma.pretraining.recipe import OptimizerRecipe, RunRecipe, TextRecipe
from pma.pretraining.run_folder import RunRecord
from pma.studies.data import Text
from pma.studies.making import Made, Prepared, Run, stopping
from pma.trajectory import Window
from pma.verbs import Choice

LAST = 3  # checkpoints that are averaged
BEST_OF = 20  # steps whose mean loss is what a run had learned
COLLAPSED = 1.0  # nats above the best of those means
WITHIN = 20  # steps within which the collapse must be found

Steps = NDArray[np.int64]
Losses = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run is `first_steps` long, and longer by `more_steps` until it has collapsed, up to `longest_steps`.
    Continuations end `after_steps` past the collapse; one that holds for `held_steps` past it has passed.
    """

    recipe: Recipe
    first_steps: int
    more_steps: int
    longest_steps: int
    after_steps: int
    held_steps: int
    tail_steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Collapsing(Run):
    """A run in pieces, until it has collapsed or is as long as it may be."""

    kind: ClassVar[str] = "collapsing"
    trial: Trial
    seed: int
    text: Text

    @property
    def title(self) -> str:
        return f"{self.trial.recipe.name} until it collapses, seed {self.seed}"

    @property
    def recipe(self) -> Recipe:
        """Of its first piece."""
        return self._of(self.trial.first_steps)

    def _of(self, steps: int) -> Recipe:
        recipe = self.trial.recipe
        run = replace(recipe.run, seed=self.seed, tokens=steps * recipe.tokens_a_step)
        return replace(recipe, run=run)

    def describe(self) -> dict[str, Any]:
        pieces = [self.trial.first_steps, self.trial.more_steps, self.trial.longest_steps]
        return {"recipe": self.recipe.to_json(), "text": self.text.digest, "pieces": pieces}

    def needs(self) -> Sequence[Made]:
        return (Prepared(recipe=self.trial.recipe, text=self.text),)

    def make(self, folder: Path, home: Path) -> None:
        trial = self.trial
        run_folder.enter(folder, RunRecord(recipe=self.recipe, text=self.text.names))
        run_folder.borrow_text(folder, self.needs()[0].folder(home))
        for length in range(trial.first_steps, trial.longest_steps + 1, trial.more_steps):
            pretrain(self._of(length), folder, text=self.text.names, progress=stopping)
            steps, losses = losses_of(folder)
            step, _ = collapse_step(steps, losses)
            if step is not None and step + WITHIN <= steps[-1]:
                break


@dataclass(frozen=True, kw_only=True, eq=False)
class BeforeCollapse(Made):
    """What `pma init --before-step S --last 3` writes: the merge of the checkpoints before a collapse."""

    kind: ClassVar[str] = "before-collapse"
    run: Collapsing
    before_step: int

    @property
    def title(self) -> str:
        return f"merge before step {self.before_step} of {self.run.title}"

    def describe(self) -> dict[str, Any]:
        return {"run": self.run.describe(), "last": LAST, "before_step": self.before_step}

    def needs(self) -> Sequence[Made]:
        return (self.run,)

    def make(self, folder: Path, home: Path) -> None:
        # checkpoints of the end of the warmup may be among them
        choice = Choice(paths=(self.run.folder(home),), window=Window(last=LAST), allow_mixed_phases=True)
        verbs.init(choice, folder, before_step=self.before_step)


@dataclass(frozen=True, kw_only=True, eq=False)
class Continued(Run):
    """A run that goes on up to step `until`, from its checkpoint of `step` or, with `merge`, from that; the
    data of the next `skipped_steps` are left out.
    """

    kind: ClassVar[str] = "continued"
    run: Collapsing
    step: int
    until: int
    skipped_steps: int = 0
    merge: BeforeCollapse | None = None

    @property
    def title(self) -> str:
        start = "the merge" if self.merge else f"step {self.step}"
        skipped = f", {self.skipped_steps} steps of data left out" if self.skipped_steps else ""
        return f"{self.run.title}, on from {start}{skipped}"

    def describe(self) -> dict[str, Any]:
        start = self.merge.describe() if self.merge else {"run": self.run.describe(), "step": self.step}
        return {"start": start, "until": self.until, "skipped_steps": self.skipped_steps}

    def needs(self) -> Sequence[Made]:
        return (self.merge or self.run,)

    def make(self, folder: Path, home: Path) -> None:
        start = self.merge.folder(home) if self.merge else self.run.checkpoint(home, self.step)
        tokens = self.until * self.run.recipe.tokens_a_step
        resume(start, folder, tokens=tokens, skip_steps=self.skipped_steps, progress=stopping)


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Where a run collapsed, the `limit` of the loss from which on a continuation counts as collapsed too,
    and what `pma spikes` told: steps of the checkpoints to go back to, oldest first, and its first alarm.
    """

    step: int
    limit: float
    before_step: int
    checkpoints: tuple[int, ...]
    first_alarm: dict[str, Any]


def losses_of(run: Path) -> tuple[Steps, Losses]:
    """The training loss of a run, by step."""
    return logs.read(run).series("loss")


def best(steps: Steps, losses: Losses) -> tuple[int, float]:
    """Where the lowest mean of 20 steps ends, and that mean; a run that collapses has it before."""
    means = np.convolve(losses, np.ones(BEST_OF) / BEST_OF, mode="valid")
    lowest = int(np.nanargmin(means))
    return int(steps[lowest + BEST_OF - 1]), float(means[lowest])


def first_worse(steps: Steps, losses: Losses, limit: float, *, after: int) -> int | None:
    """The first step past `after` whose loss is `limit` or more, or no number."""
    worse = np.flatnonzero(~(losses < limit) & (steps > after))
    return int(steps[worse[0]]) if len(worse) else None


def collapse_step(steps: Steps, losses: Losses) -> tuple[int | None, float]:
    """The first step at which a run lost a nat of the best it had learned, None if it did not; and the loss
    that is a nat above the best.
    """
    learned, lowest = best(steps, losses)
    limit = lowest + COLLAPSED
    return first_worse(steps, losses, limit, after=learned), limit


def collapse_of(run: Path) -> tuple[int | None, Collapse | None]:
    """The step at which a run collapsed; and all of the collapse, unless the detector missed it within 20
    steps, told from what had been logged by then, or there are not three checkpoints before it.
    """
    steps, losses = losses_of(run)
    step, limit = collapse_step(steps, losses)
    if step is None:
        return None, None
    known = steps <= step + WITHIN
    found = [b for b in find(steps[known], losses[known], "loss") if b.last_step >= step]
    if not found:
        return step, None
    ways = trajectory.spikes(run, last=LAST).ways_past
    way = next(way for way in ways if way.breakaway.first_step == found[0].first_step)
    checkpoints = tuple(point.step or 0 for point in way.checkpoints)
    if len(checkpoints) < LAST:
        return step, None
    told = way.breakaway
    alarm = {"first_step": told.first_step, "seen_step": told.seen_step, "kind": told.kind.value}
    return step, Collapse(
        step=step, limit=limit, before_step=way.before_step, checkpoints=checkpoints, first_alarm=alarm
    )


def trial_of(preset: str) -> Trial:
    """The setting of a preset: the one that was found by trial, and for `toy` a smaller one."""
    return _TOY if preset == "toy" else _FOUND


def _recipe(
    name: str, *, hidden: int, layers: int, vocabulary: int, rate: float, warmup_steps: int, run: RunRecipe
) -> Recipe:
    """An OLMoE with 4 experts of which 2 are active."""
    model = {
        "model_type": "olmoe",
        "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
    }
    return Recipe(
        name=name,
        model=model,
        text=TextRecipe(vocabulary_tokens=vocabulary, context_tokens=32),
        # beta2 is Adam's own default: the longer its memory, the less it sees of gradients that grow; the
        # clip is none
        optimizer=OptimizerRecipe(
            learning_rate=rate, warmup_steps=warmup_steps, beta2=0.999, gradient_clip=1e9
        ),
        run=run,
    )


def _run(*, first_steps: int, every_steps: int, sequences: int) -> RunRecipe:
    a_step = sequences * 32
    return RunRecipe(
        tokens=first_steps * a_step,
        checkpoint_every_tokens=every_steps * a_step,
        batch_sequences=sequences,
        log_every_steps=1,
    )


# 0.07M parameters, at 275 times the rate that is right for its like
_FOUND = Trial(
    recipe=_recipe(
        "nano-moe-collapsing",
        hidden=32,
        layers=2,
        vocabulary=512,
        rate=0.55,
        warmup_steps=200,
        run=_run(first_steps=255, every_steps=15, sequences=64),
    ),
    first_steps=255,
    more_steps=45,
    longest_steps=435,
    after_steps=75,
    held_steps=50,
    tail_steps=25,
)
_TOY = Trial(
    recipe=_recipe(
        "toy-moe-collapsing",
        hidden=16,
        layers=1,
        vocabulary=300,
        rate=1.0,
        warmup_steps=80,
        run=_run(first_steps=100, every_steps=5, sequences=8),
    ),
    first_steps=100,
    more_steps=20,
    longest_steps=120,
    after_steps=15,
    held_steps=10,
    tail_steps=5,
)
