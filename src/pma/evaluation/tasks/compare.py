"""Rows of models against the first, task by task, and on the weighted mean of all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pma.evaluation.paired import Estimate
from pma.evaluation.tasks import scores
from pma.evaluation.tasks.scores import TaskResult

MEAN = "weighted mean"


def compare_tasks(
    names: Sequence[str], results: Sequence[Sequence[TaskResult]], weights: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each task and model, plain values; where there are several tasks, also for their mean.

    `results`: by model and task, in the order of `names` and `weights`. `improvement` and `nats_improvement`
    are over the first model, paired by item, positive where this one is better; None in the first's own row.
    Raises InputError where models were not evaluated on the same items.
    """
    rows = []
    for place, task in enumerate(weights):
        for name, own in zip(names, results, strict=True):
            mine, first = own[place], results[0][place]
            baseline = own is results[0]
            rows.append(
                {
                    "task": task,
                    "model": name,
                    "metric": mine.metric.removesuffix(",none"),
                    "score": _plain(scores.score(mine)),
                    "improvement": None if baseline else _plain(scores.score_difference(mine, first)),
                    "nats": _plain(scores.nats(mine)),
                    "nats_improvement": None if baseline else _plain(scores.nats_difference(first, mine)),
                }
            )
    return rows + (_mean_rows(names, results, list(weights.values())) if len(weights) > 1 else [])


def _mean_rows(
    names: Sequence[str], results: Sequence[Sequence[TaskResult]], weights: Sequence[float]
) -> list[dict[str, Any]]:
    rows = []
    for name, own in zip(names, results, strict=True):
        pairs = list(zip(own, results[0], strict=True))
        improvement = None if own is results[0] else _plain(scores.mean_difference(pairs, weights))
        score = _plain(scores.mean_score(own, weights))
        rows.append(
            {
                "task": MEAN,
                "model": name,
                "metric": "",
                "score": score,
                "improvement": improvement,
                "nats": None,
                "nats_improvement": None,
            }
        )
    return rows


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)
