"""Scores on tasks as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("task", "model", "metric", "score", "better by", "nats of the right answer", "lower by")


def tasks_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of rows as `evaluation.tasks.compare_tasks` makes them; a task is named once."""
    cells, last = [], None
    for row in rows:
        task = "" if row["task"] == last else str(row["task"])
        last = row["task"]
        score, better = (_percent(row[name], sign) for name, sign in (("score", ""), ("improvement", "+")))
        nats, lower = (_nats(row[name], sign) for name, sign in (("nats", ""), ("nats_improvement", "+")))
        cells.append([task, str(row["model"]), str(row["metric"]), score, better, nats, lower])
    return list(_COLUMNS), cells


def _percent(estimate: Mapping[str, float] | None, sign: str) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate['value']:{sign}.2f}% ± {100 * estimate['standard_error']:.2f}%"


def _nats(estimate: Mapping[str, float] | None, sign: str) -> str:
    return "" if estimate is None else f"{estimate['value']:{sign}.3f} ± {estimate['standard_error']:.3f}"
