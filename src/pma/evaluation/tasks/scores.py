"""Scores on tasks, kept item by item so that two models can be paired; and their weighted mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pma.errors import InputError, UsageError
from pma.evaluation.paired import Estimate, Values, stratified_mean


@dataclass(frozen=True, kw_only=True)
class TaskPart:
    """One of the harness's tasks. `scores`: by metric, a value for each item; `loglikelihoods`: nats of each
    answer of each item; `gold`: which answer is right (empty where none, or several, are).

    `weight`: this part's share of the score of the task that was asked for.
    """

    name: str
    weight: float
    scores: dict[str, tuple[float, ...]]
    loglikelihoods: tuple[tuple[float, ...], ...]
    gold: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one model scored on one task. `metric`: which of the scores counts, as the harness names it.

    `digest`: of the items; results of one digest can be paired. `harness`: the harness's own results.
    """

    name: str
    digest: str
    metric: str
    parts: tuple[TaskPart, ...]
    harness: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values; everything but `harness` is ours."""
        nats_R = nats(self)
        summary = {"score": asdict(score(self)), "nats": None if nats_R is None else asdict(nats_R)}
        return {"summary": summary, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskResult:
        """The inverse of `to_json`. Raises ValueError, LookupError or TypeError for what is none."""
        parts = [
            TaskPart(
                name=str(part["name"]),
                weight=float(part["weight"]),
                scores={str(metric): tuple(map(float, items)) for metric, items in part["scores"].items()},
                loglikelihoods=tuple(tuple(map(float, answers)) for answers in part["loglikelihoods"]),
                gold=tuple(map(int, part["gold"])),
            )
            for part in value["parts"]
        ]
        plain = {name: value[name] for name in ("name", "digest", "metric", "harness")}
        result = cls(parts=tuple(parts), **plain)
        for part in parts:
            _scores(result, part), _nats(part)  # what is missing is found here
        return result


def score(result: TaskResult) -> Estimate:
    """The mean of the metric that counts, with its error over items."""
    return stratified_mean([_scores(result, part) for part in result.parts], _weights(result))


def nats(result: TaskResult) -> Estimate | None:
    """Mean of -log p(right answer); None where the task has no single right answer. Lower is better."""
    values = [_nats(part) for part in result.parts]
    return None if any(len(each) == 0 for each in values) else stratified_mean(values, _weights(result))


def score_difference(a: TaskResult, b: TaskResult) -> Estimate:
    """Score of a minus score of b, paired by item. Raises InputError where they are not of the same items."""
    return mean_difference([(a, b)], [1.0])


def nats_difference(a: TaskResult, b: TaskResult) -> Estimate | None:
    """Nats of a minus nats of b, paired by item."""
    if nats(a) is None:
        return None
    return _stratified([(a, b)], [1.0], lambda result, part: _nats(part))


def mean_score(results: Sequence[TaskResult], weights: Sequence[float]) -> Estimate:
    """The weighted mean of several tasks' scores; its error is over items within each task."""
    values = [_scores(result, part) for result in results for part in result.parts]
    shares = [
        weight * part.weight for result, weight in zip(results, weights, strict=True) for part in result.parts
    ]
    return stratified_mean(values, shares)


def mean_difference(pairs: Sequence[tuple[TaskResult, TaskResult]], weights: Sequence[float]) -> Estimate:
    """The weighted mean of several tasks' differences (a minus b of each pair), paired by item."""
    return _stratified(pairs, weights, _scores)


def task_weights(names: Sequence[str], given: str | None) -> dict[str, float]:
    """Weights of `names` as people write them, "blimp=2,piqa=1"; equal where nothing is given.

    Raises UsageError for what is not a weight, not a task, or left out.
    """
    if given is None:
        return dict.fromkeys(names, 1.0)
    weights = {}
    for text in given.split(","):
        name, _, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = -1.0
        if name not in names or not 0 <= weights[name] < float("inf"):
            raise UsageError(
                f"--weights {text!r}: expected task=number with one of the tasks {', '.join(names)}, "
                "and no negative number"
            )
    if missing := [name for name in names if name not in weights]:
        raise UsageError(f"--weights leaves out {', '.join(missing)}; give each task a weight, 0 for none")
    if not sum(weights.values()):
        raise UsageError("--weights are all 0; give a task a weight")
    return {name: weights[name] for name in names}


def _stratified(
    pairs: Sequence[tuple[TaskResult, TaskResult]],
    weights: Sequence[float],
    values: Callable[[TaskResult, TaskPart], Values],
) -> Estimate:
    differences, shares = [], []
    for (a, b), weight in zip(pairs, weights, strict=True):
        if a.digest != b.digest or [part.name for part in a.parts] != [part.name for part in b.parts]:
            raise InputError(
                f"{a.name}: two models were not evaluated on the same items with the same settings"
            )
        for part_a, part_b in zip(a.parts, b.parts, strict=True):
            differences.append(values(a, part_a) - values(b, part_b))
            shares.append(weight * part_a.weight)
    return stratified_mean(differences, shares)


def _weights(result: TaskResult) -> list[float]:
    return [part.weight for part in result.parts]


def _scores(result: TaskResult, part: TaskPart) -> Values:
    return np.asarray(part.scores[result.metric], dtype=np.float64)


def _nats(part: TaskPart) -> Values:
    if not part.gold:
        return np.empty(0)
    right = [answers[gold] for answers, gold in zip(part.loglikelihoods, part.gold, strict=True)]
    return -np.asarray(right, dtype=np.float64)
