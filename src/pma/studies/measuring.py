"""Models of a study, measured: raw checkpoints and merges that are not written, kept in a store by
content.
"""

from __future__ import annotations

import atexit
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pma import engine, verbs
from pma.engine import SNAPSHOTS, MergeOptions
from pma.errors import Interrupted
from pma.evaluation import Document, read_documents
from pma.evaluation.evaluate import Evaluation
from pma.evaluation.measures import TEXT, Measure, response_measure, task_measure, text_measure
from pma.evaluation.model import load_scorer
from pma.evaluation.responses import read_exchanges
from pma.evaluation.tasks import Task, TaskResult, prepared
from pma.results import Store
from pma.studies.making import Run, checkpoints
from pma.sweeping import merge_key
from pma.verbs import Choice

STORE_FILE = "results.sqlite"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model of a run: the merge of `last` checkpoints up to step `at`, `every` steps apart; one is a raw
    checkpoint. `scheme`, `weights` (instead of it) and `use` as `pma merge` has them.
    """

    run: Run
    at: int
    last: int = 1
    every: int = 1
    scheme: str = "sma"
    weights: tuple[float, ...] | None = None
    use: str = SNAPSHOTS

    def choice(self, home: Path) -> Choice:
        """Its checkpoints."""
        paths = tuple(checkpoints(self.run, home, self.last, self.every, self.at))
        return Choice(paths=paths, allow_mixed_phases=True)

    def options(self) -> MergeOptions:
        """How they are merged."""
        if self.weights is not None:
            return MergeOptions(weights=self.weights, use=self.use, threads=1)
        return MergeOptions(scheme=self.scheme, use=self.use, threads=1)


@dataclass(frozen=True, kw_only=True)
class How:
    """What is measured: on the text of that name in the run's folder, the beginnings of its documents (of
    rows of prompts, the responses); and tasks. `of`: the folder of another run, whose text it is instead.
    """

    where: str
    cloze: int
    characters_a_document: int
    tasks: tuple[Path, ...]
    task_items: int
    of: Path | None = None

    @property
    def key(self) -> str:
        """Tells settings apart."""
        names = [path.name for path in self.tasks]
        return f"{self.where} {self.cloze} {self.characters_a_document} {names} {self.task_items}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model scored: on the text, and by task."""

    text: Evaluation
    tasks: dict[str, TaskResult]


def measure(item: Measured, how: How, home: Path, deadline: float | None = None) -> None:
    """Measure it and keep the results. Raises Interrupted past the deadline."""
    if deadline is not None and time.time() > deadline:
        raise Interrupted("the time is used up; the same command goes on")
    with verbs.plan(item.choice(home), item.options()) as planned:
        key = merge_key(planned)
        with Store(home / STORE_FILE) as store:
            missing = [m for m in _measures(item.run.folder(home), how) if store.get(key, m.key) is None]
            if not missing:
                return
            scorer = load_scorer(engine.average(planned), planned.sources[-1].point.path)
            for measure in missing:
                result = measure.run(key[:12], scorer).to_json()
                store.put(key, measure.key, merge={"at": item.at, "last": item.last}, result=result)


def known(item: Measured, how: How, home: Path) -> Reading | None:
    """The results that are kept of it; None where any is missing."""
    with verbs.plan(item.choice(home), item.options()) as planned:
        key = merge_key(planned)
    found: dict[str, Any] = {}
    with Store(home / STORE_FILE) as store:
        for measure in _measures(item.run.folder(home), how):
            value = store.get(key, measure.key)
            if value is None:
                return None
            found[measure.name] = measure.read(value)
    text = found.pop(TEXT)
    return Reading(text=text, tasks={name.removeprefix("task "): result for name, result in found.items()})


@cache
def _measures(run: Path, how: How) -> tuple[Measure, ...]:
    text = (how.of or run) / "text"
    rows = text / f"{how.where}.jsonl"
    if rows.is_file():
        made = [response_measure(read_exchanges([rows]), context_tokens=None)]
    else:
        documents = beginnings(text / f"{how.where}.txt", how.characters_a_document)
        made = [text_measure(documents, cloze=how.cloze, context_tokens=None)]
    if how.tasks:
        made += [task_measure(task, context_tokens=None) for task in _tasks(how.tasks, how.task_items)]
    return tuple(made)


def beginnings(path: Path, characters: int) -> tuple[Document, ...]:
    """The documents of a text, each cut after so many characters: a long book counts as much as a short
    story.
    """
    return tuple(Document(name=d.name, text=d.text[:characters]) for d in read_documents([path]))


@cache
def _tasks(paths: tuple[Path, ...], items: int) -> tuple[Task, ...]:
    """The tasks of these files; what they are read from stays until the process ends."""
    tasks, _ = _OPEN.enter_context(prepared([str(path) for path in paths], items))
    return tuple(tasks)


_OPEN = ExitStack()
atexit.register(_OPEN.close)
