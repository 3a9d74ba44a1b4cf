"""What a sweep found, a row a merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pma.evaluation.measures import TEXT, task_name
from pma.sweeping.evaluating import Results
from pma.sweeping.grid import Sweep

if TYPE_CHECKING:
    from pma.evaluation.evaluate import Evaluation


def rows(
    sweep: Sweep, results: Mapping[int, Results], weights: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One row for each cell, best first: what it is, and what was measured of it and of the raw checkpoint it
    ends with: loss, bits per byte and cloze where there is a text; the scores on the tasks of `weights`, and
    their mean.

    Gains over the raw checkpoint are paired, and positive where the merge is better.
    """
    made = []
    for cell in sweep.cells:
        own, raw = results[cell.plan], results[sweep.raw[cell.at]]
        row = {
            "scheme": cell.scheme,
            "last": cell.last,
            "every": "-" if cell.every is None else str(cell.every),
            "every_order": 0 if cell.every is None else cell.every.count,
            "at": cell.at,
            "steps": [source.point.step for source in sweep.plans[cell.plan].sources],
            "merge_key": sweep.keys[cell.plan],
        }
        if TEXT in own:
            row |= _text_values(own[TEXT], raw[TEXT])
        if weights:
            row |= _task_values(own, raw, weights)
        made.append(row)
    if made and "loss" in made[0]:
        return sorted(made, key=lambda row: row["loss"])
    return sorted(made, key=lambda row: -row["mean_score"])


def _text_values(own: Evaluation, raw: Evaluation) -> dict[str, Any]:
    from pma.evaluation.evaluate import loss_difference

    gain = loss_difference(raw, own)
    return {
        "loss": own.loss.value,
        "standard_error": own.loss.standard_error,
        "gain": gain.value,
        "gain_standard_error": gain.standard_error,
        "bits_per_byte": own.bits_per_byte,
        "cloze": own.cloze_accuracy,
    }


def _task_values(own: Results, raw: Results, weights: Mapping[str, float]) -> dict[str, Any]:
    from pma.evaluation.tasks import scores

    pairs = [(own[task_name(task)], raw[task_name(task)]) for task in weights]
    mean = scores.mean_score([mine for mine, _ in pairs], list(weights.values()))
    gain = scores.mean_difference(pairs, list(weights.values()))
    tasks = {}
    for task, (mine, last) in zip(weights, pairs, strict=True):
        score, better = scores.score(mine), scores.score_difference(mine, last)
        tasks[task] = {
            "metric": mine.metric,
            "score": score.value,
            "standard_error": score.standard_error,
            "gain": better.value,
            "gain_standard_error": better.standard_error,
        }
    return {
        "tasks": tasks,
        "mean_score": mean.value,
        "mean_score_standard_error": mean.standard_error,
        "mean_score_gain": gain.value,
        "mean_score_gain_standard_error": gain.standard_error,
    }
