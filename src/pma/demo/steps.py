"""The demo's folder: what is in it, which steps make it, and the command that repeats each."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from pma import engine, verbs
from pma.engine import MergeOptions
from pma.engine.provenance import RECORD_FILE
from pma.errors import UsageError
from pma.pretraining import Pretraining, Recipe, fork, pretrain
from pma.pretraining.train import Progress
from pma.trajectory import Window
from pma.verbs import Choice

LAST = 10
SCHEMES = ("sma", "wma", "ema:0.2")
ANNEAL = "cosine"
# the anneal's length as a share of the run's, and as many tokens more at constant rate to compare with
ANNEAL_SHARE = 5

TrainingBar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where everything of a demo lies and how long its parts are."""

    folder: Path
    recipe: Recipe

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def annealed(self) -> Path:
        return self.folder / "annealed"

    @property
    def steps(self) -> int:
        return self.recipe.steps_for(self.recipe.run.tokens)

    @property
    def anneal_tokens(self) -> int:
        return self.recipe.steps_for(self.recipe.run.tokens // ANNEAL_SHARE) * self.recipe.tokens_a_step

    @property
    def all_tokens(self) -> int:
        return self.steps * self.recipe.tokens_a_step + self.anneal_tokens

    @property
    def last_step(self) -> int:
        return self.steps + self.anneal_tokens // self.recipe.tokens_a_step

    def checkpoint(self, step: int) -> Path:
        """The constant run's checkpoint of that step."""
        return self.run / f"checkpoint-{step}"

    def merged(self, scheme: str) -> Path:
        """Where the merge by `scheme` is written."""
        return self.folder / "merged" / scheme.replace(":", "-")

    def window(self, at: int) -> Choice:
        """The last ten checkpoints up to step `at`."""
        return Choice(paths=(self.run,), window=Window(last=LAST, at=at))

    def commands(self) -> list[dict[str, str]]:
        """Title and command line of each step, as a user would type them."""
        run, name = str(self.run), self.recipe.name
        last, final = str(self.checkpoint(self.steps)), str(self.annealed / f"checkpoint-{self.last_step}")
        merged = [str(self.merged(scheme)) for scheme in SCHEMES]
        decay = ["--anneal", ANNEAL, "--tokens", str(self.anneal_tokens)]
        lines = [
            ("Pre-train at constant learning rate", ["pma", "pretrain", name, "-o", run]),
            *(
                (
                    f"Merge the last {LAST} checkpoints: {scheme}",
                    [
                        "pma",
                        "merge",
                        run,
                        "--last",
                        str(LAST),
                        "--at",
                        str(self.steps),
                        "--scheme",
                        scheme,
                        "-o",
                        out,
                    ],
                )
                for scheme, out in zip(SCHEMES, merged, strict=True)
            ),
            (
                f"Anneal a fork for {self.anneal_tokens} tokens more",
                ["pma", "pretrain", "--fork-from", last, *decay, "-o", str(self.annealed)],
            ),
            (
                "Go on at constant rate for as many tokens, to compare",
                ["pma", "pretrain", name, "--tokens", str(self.all_tokens), "-o", run],
            ),
            ("Evaluate them on the same held-out text", ["pma", "eval", last, *merged, "--annealed", final]),
            (
                "The same merge at the annealed run's token count",
                ["pma", "eval", run, "--merge", "--last", str(LAST), "--at", str(self.last_step)],
            ),
            ("Check a merge against its sources", ["pma", "verify", merged[0]]),
            ("Write this report again", ["pma", "report", str(self.folder)]),
        ]
        return [{"title": title, "line": shlex.join(line)} for title, line in lines]


def pretrain_until(demo: Demo, tokens: int, bar: TrainingBar, title: str) -> Pretraining:
    """Take the constant run to `tokens`; nothing happens where it is there already."""
    recipe = replace(demo.recipe, run=replace(demo.recipe.run, tokens=tokens))
    with bar(title) as progress:
        return pretrain(recipe, demo.run, progress=progress)


def anneal(demo: Demo, bar: TrainingBar) -> Pretraining:
    """Fork the constant run at the end of its planned length."""
    with bar("annealing") as progress:
        return fork(
            demo.checkpoint(demo.steps),
            demo.annealed,
            anneal=ANNEAL,
            tokens=demo.anneal_tokens,
            progress=progress,
        )


def merge(demo: Demo, scheme: str) -> None:
    """Write the merge by `scheme`, unless it is there and its sources are still the same."""
    out = demo.merged(scheme)
    if (out / RECORD_FILE).is_file():
        found = engine.verify(out, samples=0)
        if found.findings or found.sources_changed:
            wrong = (found.findings + found.sources_changed)[0]
            raise UsageError(
                f"{out} does not fit this demo any more ({wrong}); remove it and run the demo again"
            )
        return
    verbs.merge(demo.window(demo.steps), out, MergeOptions(scheme=scheme))
