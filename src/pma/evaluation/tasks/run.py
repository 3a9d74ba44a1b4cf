"""Tasks made ready, and run on a model that was built from tensors, for every item's result."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma.errors import UsageError
from pma.evaluation.tasks.files import is_path, read_tasks
from pma.evaluation.tasks.harness import Task, harness_version, quiet
from pma.evaluation.tasks.local import local_tasks
from pma.evaluation.tasks.own import own_tasks
from pma.evaluation.tasks.scores import TaskPart, TaskResult
from pma.results import content_key

if TYPE_CHECKING:
    from pma.evaluation.scoring import Scorer

# for errors of the harness's own that have no formula, such as a perplexity's
_BOOTSTRAP_DRAWS = 1_000
_FEWSHOT_SEED = 1234  # the harness's


@contextmanager
def prepared(
    specs: Sequence[str], limit: int | None = None
) -> Iterator[tuple[list[Task], list[tuple[Path, str]]]]:
    """For the block, the tasks of `specs` (names of the harness's tasks, paths of .jsonl files or folders);
    and which files of folders were left out, and why.

    Raises MissingExtra, UsageError for a name that is not known or is given twice, InputError for data that
    cannot be read or reached.
    """
    harness_version()
    paths = [Path(spec) for spec in specs if is_path(spec)]
    names = list(dict.fromkeys(spec for spec in specs if not is_path(spec)))
    local, left_out = read_tasks(paths, limit) if paths else ([], [])
    with tempfile.TemporaryDirectory(prefix="pma-tasks-") as folder:
        with quiet():
            tasks = [*local_tasks(local, Path(folder)), *own_tasks(names, limit)]
        if twice := {task.name for task in tasks if sum(task.name == other.name for other in tasks) > 1}:
            raise UsageError(f"there are two tasks named {sorted(twice)[0]}; rename a file or give it once")
        yield tasks, left_out


def run_task(scorer: Scorer, task: Task) -> TaskResult:
    """The result of one model on `task`, item by item. Raises InputError where an answer exceeds the model's
    context, or the model gives no finite log-likelihoods.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        from pma.evaluation.tasks.model import harness_model

        loaded = task.load()
        for each in loaded["tasks"].values():
            each.set_fewshot_seed(seed=_FEWSHOT_SEED)  # each model sees the same examples
        results: Any = evaluate(
            harness_model(scorer),
            loaded,
            limit=task.limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
        )
    samples = results.pop("samples")
    weights = _weights(
        task, loaded, {name: len({row["doc_id"] for row in rows}) for name, rows in samples.items()}
    )
    parts = [_part(name, loaded["tasks"][name], rows, weights[name]) for name, rows in samples.items()]
    metrics = [key for key in parts[0].scores if key.split(",")[0] == task.metric]
    return TaskResult(
        name=task.name,
        digest=content_key(task.key),
        metric=metrics[0],
        parts=tuple(parts),
        harness=_plain(results),
    )


def _weights(task: Task, loaded: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, float]:
    """What share of the score each part has: as the harness's group has it, else all are one part."""
    group = loaded["groups"].get(task.name)
    by_size = group is None or next(
        each.weight_by_size for each in group.aggregate_metric_list if each.metric == task.metric
    )
    shares = {name: count if by_size else 1 for name, count in counts.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def _part(name: str, task: Any, rows: Sequence[Mapping[str, Any]], weight: float) -> TaskPart:
    from lm_eval.api.metrics import mean

    means = [metric for metric, aggregate in task.aggregation().items() if aggregate is mean]
    scores: dict[str, list[float]] = {}
    for row in rows:
        for metric in means:
            if metric in row:
                scores.setdefault(f"{metric},{row['filter']}", []).append(float(row[metric]))
    loglikelihoods: list[tuple[float, ...]] = []
    gold: list[int] = []
    if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
        first = [row for row in rows if row["filter"] == rows[0]["filter"]]
        loglikelihoods = [tuple(answer[0][0] for answer in row["resps"]) for row in first]
        targets = [row["target"] if task.OUTPUT_TYPE == "multiple_choice" else 0 for row in first]
        if all(type(target) is int for target in targets):
            gold = targets
    return TaskPart(
        name=name,
        weight=weight,
        scores={key: tuple(values) for key, values in scores.items()},
        loglikelihoods=tuple(loglikelihoods),
        gold=tuple(gold),
    )


def _plain(results: Any) -> dict[str, Any]:
    """The harness's results as its own command writes them to JSON; JSON has no NaN, which becomes null."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, default=handle_non_serializable)
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return plain
