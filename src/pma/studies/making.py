"""What studies share: training runs and merges that are made once, in a folder named by what decides them."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pma import verbs
from pma.pretraining import Recipe, fork, pretrain, resume, run_folder
from pma.pretraining.run_folder import RunRecord
from pma.results import content_key
from pma.studies.data import Text
from pma.verbs import Choice

OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True, kw_only=True, eq=False)
class Made(ABC):
    """Something that takes long to make and is kept. Equal descriptions are made once."""

    kind: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """What it is, for people."""
        return self.kind

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides it, as plain values."""

    def needs(self) -> Sequence[Made]:
        """What must be there before it is made."""
        return ()

    @abstractmethod
    def make(self, folder: Path, home: Path) -> None:
        """Make it in `folder`, going on where an earlier attempt stopped; what it needs lies in `home`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Made) and (self.kind, self.describe()) == (other.kind, other.describe())

    def __hash__(self) -> int:
        return hash(content_key(self.describe()))

    def folder(self, home: Path) -> Path:
        """Where it lies in the studies' folder `home`."""
        return home / "made" / f"{self.kind}-{content_key(self.describe())[:16]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run(Made):
    """A training run: a folder of checkpoints."""

    def checkpoint(self, home: Path, step: int) -> Path:
        """Its checkpoint of that step."""
        return self.folder(home) / f"checkpoint-{step}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared(Made):
    """A text, split and tokenized once for all runs on it."""

    kind: ClassVar[str] = "text"
    recipe: Recipe
    text: Text

    def describe(self) -> dict[str, Any]:
        return {"text": self.text.digest, "vocabulary_tokens": self.recipe.text.vocabulary_tokens}

    def make(self, folder: Path, home: Path) -> None:
        folder.mkdir(exist_ok=True)
        run_folder.prepare_text(folder, self.recipe, self.text.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trunk(Run):
    """A run at constant learning rate. `resumable_steps`: whose optimizer's state, two thirds of a
    checkpoint, is kept once the run is done; None keeps all.
    """

    kind: ClassVar[str] = "trunk"
    recipe: Recipe
    text: Text
    resumable_steps: tuple[int, ...] | None = None

    @property
    def title(self) -> str:
        recipe = self.recipe
        return f"{recipe.name}, rate {recipe.optimizer.learning_rate:g}, seed {recipe.run.seed}"

    def describe(self) -> dict[str, Any]:
        return {"recipe": self.recipe.to_json(), "text": self.text.digest}

    def needs(self) -> Sequence[Made]:
        return (Prepared(recipe=self.recipe, text=self.text),)

    def make(self, folder: Path, home: Path) -> None:
        run_folder.enter(folder, RunRecord(recipe=self.recipe, text=self.text.names))
        run_folder.borrow_text(folder, self.needs()[0].folder(home))
        pretrain(self.recipe, folder, text=self.text.names, progress=stopping)
        if self.resumable_steps is not None:
            _drop_optimizers(folder, but=self.resumable_steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Anneal(Run):
    """A fork of a trunk that decays from `step` for `steps`. Its checkpoints up to there are its trunk's."""

    kind: ClassVar[str] = "anneal"
    trunk: Trunk
    step: int
    steps: int
    shape: str = "cosine"

    @property
    def title(self) -> str:
        return f"{self.trunk.title}, annealed from step {self.step}"

    def describe(self) -> dict[str, Any]:
        return {"trunk": self.trunk.describe(), "step": self.step, "steps": self.steps, "shape": self.shape}

    def needs(self) -> Sequence[Made]:
        return (self.trunk,)

    def checkpoint(self, home: Path, step: int) -> Path:
        return (self.trunk if step <= self.step else self).folder(home) / f"checkpoint-{step}"

    def make(self, folder: Path, home: Path) -> None:
        tokens = self.steps * self.trunk.recipe.tokens_a_step
        start = self.trunk.checkpoint(home, self.step)
        fork(start, folder, anneal=self.shape, tokens=tokens, progress=stopping)
        _drop_optimizers(folder)  # nothing goes on from the middle of a decay


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged(Made):
    """The merge of the `last` checkpoints of a run up to step `at`, `every` steps apart, as `pma init`
    writes it.
    """

    kind: ClassVar[str] = "merged"
    run: Run
    last: int
    every: int
    at: int
    optimizer: str = "newest"
    purpose: str = "resume"

    def describe(self) -> dict[str, Any]:
        window = [self.last, self.every, self.at]
        return {"run": self.run.describe(), "window": window, "init": [self.optimizer, self.purpose]}

    def needs(self) -> Sequence[Made]:
        return (self.run,)

    def make(self, folder: Path, home: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        choice = Choice(paths=tuple(checkpoints(self.run, home, self.last, self.every, self.at)))
        verbs.init(choice, folder, optimizer=self.optimizer, purpose=self.purpose)


@dataclass(frozen=True, kw_only=True, eq=False)
class Resumed(Run):
    """A trunk that goes on, up to step `until`, from a merge of its own that holds an optimizer's state."""

    kind: ClassVar[str] = "resumed"
    start: Merged
    until: int

    def describe(self) -> dict[str, Any]:
        return {"start": self.start.describe(), "until": self.until}

    def needs(self) -> Sequence[Made]:
        return (self.start,)

    def make(self, folder: Path, home: Path) -> None:
        trunk = self.start.run
        assert isinstance(trunk, Trunk)
        tokens = self.until * trunk.recipe.tokens_a_step
        resume(self.start.folder(home), folder, tokens=tokens, progress=stopping)


def _drop_optimizers(folder: Path, but: Sequence[int] = ()) -> None:
    """Two thirds of a checkpoint, of which only those of the steps `but` are gone on from."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) not in but:
            (checkpoint / OPTIMIZER_FILE).unlink(missing_ok=True)


def checkpoints(run: Run, home: Path, last: int, every: int, at: int) -> list[Path]:
    """The folders of the `last` checkpoints up to step `at`, `every` steps apart, oldest first."""
    return [run.checkpoint(home, at - every * back) for back in reversed(range(last))]


def ensure(made: Made, home: Path, deadline: float | None = None) -> None:
    """Make it unless it is there; several processes may ask for the same. `deadline`: of time.time().

    Raises Interrupted past the deadline; the same call goes on.
    """
    folder = made.folder(home)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_suffix(".lock")):
        if seconds(made, home) is not None:
            return
        _DEADLINE.at = deadline
        spent, started = _spent_file(folder), time.monotonic()
        before = float(spent.read_text()) if spent.is_file() else 0.0
        try:
            made.make(folder, home)
        finally:
            took = before + time.monotonic() - started
            spent.write_text(f"{took}\n")
        record = {"kind": made.kind, "seconds": took, "what": made.describe()}
        _done_file(folder).write_text(json.dumps(record, indent=1) + "\n")
        spent.unlink()


def seconds(made: Made, home: Path) -> float | None:
    """What making it took; None where it is not made yet."""
    done = _done_file(made.folder(home))
    return float(json.loads(done.read_text())["seconds"]) if done.is_file() else None


def _done_file(folder: Path) -> Path:
    return folder.with_suffix(".json")


def _spent_file(folder: Path) -> Path:
    return folder.with_suffix(".spent")


@dataclass
class _Deadline:
    at: float | None = None


_DEADLINE = _Deadline()


def stopping(step: int, last_step: int, loss: float | None) -> None:
    """Ends a training at the deadline, as an interrupt would; its newest checkpoint is gone on from."""
    if _DEADLINE.at is not None and time.time() > _DEADLINE.at:
        raise KeyboardInterrupt


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
