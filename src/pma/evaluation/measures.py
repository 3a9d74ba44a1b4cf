"""What is computed for each merge of a sweep and kept: the losses of a text, the score on a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from pma import __version__
from pma.evaluation.tasks import Task, TaskResult, run_task
from pma.evaluation.text import Document
from pma.results import content_key

if TYPE_CHECKING:
    from pma.evaluation.responses import Exchange
    from pma.evaluation.scoring import Scorer

TEXT = "text"


class Result(Protocol):
    """What a measure gives."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`run(name, scorer)` measures, `read` takes a result's JSON back, `key` tells measures apart. `needs`:
    distributions whose code decides the result.
    """

    name: str
    key: str
    run: Callable[[str, Scorer], Result]
    read: Callable[[dict[str, Any]], Result]
    needs: tuple[str, ...] = ("torch", "transformers")


def text_measure(documents: Sequence[Document], *, cloze: int, context_tokens: int | None) -> Measure:
    """An `Evaluation` on `documents`. Its name is TEXT."""
    from pma.evaluation.evaluate import Evaluation, evaluate

    texts = [blake3(document.text.encode()).hexdigest() for document in documents]
    key = {"texts": texts, "cloze": cloze, "context_tokens": context_tokens, "pma": __version__}
    return Measure(
        name=TEXT,
        key=content_key(key),
        run=lambda name, scorer: evaluate(name, scorer, documents, cloze=cloze),
        read=Evaluation.from_json,
    )


def response_measure(exchanges: Sequence[Exchange], *, context_tokens: int | None) -> Measure:
    """An `Evaluation` of the responses of `exchanges`; it stands for that of a text, so its name is TEXT."""
    from pma.evaluation.evaluate import Evaluation
    from pma.evaluation.responses import evaluate_responses

    rows = [[exchange.prompt, exchange.response] for exchange in exchanges]
    key = {"responses": content_key(rows), "context_tokens": context_tokens, "pma": __version__}
    return Measure(
        name=TEXT,
        key=content_key(key),
        run=lambda name, scorer: evaluate_responses(name, scorer, exchanges),
        read=Evaluation.from_json,
    )


def task_measure(task: Task, *, context_tokens: int | None) -> Measure:
    """A `TaskResult`, named by `task_name`."""
    key = {**task.key, "context_tokens": context_tokens, "pma": __version__}
    return Measure(
        name=task_name(task.name),
        key=content_key(key),
        run=lambda _, scorer: run_task(scorer, task),
        read=TaskResult.from_json,
        needs=(*Measure.needs, "lm-eval"),
    )


def task_name(name: str) -> str:
    """The name of the measure of task `name`: no task can be taken for the text."""
    return f"task {name}"
