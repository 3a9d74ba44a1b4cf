"""Small files of tasks, of every shape."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PAIRS = [{"good": f"The cat {i} sleeps.", "bad": f"The cat sleep {i}."} for i in range(8)]
CHOICES = [
    {
        "context": f"Question: {i} and {i}?\nAnswer:",
        "choices": [f"{i + i}", "fish and chips", f"{i}"][: 2 + i % 2],
        "gold": i % 2,
    }
    for i in range(9)
]
TARGETS = [{"context": f"once more {i}, and once", "target": "more" if i % 2 else "again"} for i in range(7)]
ARC = [
    {
        "question": f"What is {i}?",
        "choices": {"text": ["a", "bb"], "label": ["A", "B"]},
        "answerKey": "AB"[i % 2],
    }
    for i in range(4)
]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows` as lines of JSON; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """A folder with a file of each shape, and one of no task."""
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "choices.jsonl", CHOICES)
    write_jsonl(folder / "targets.jsonl", TARGETS)
    write_jsonl(folder / "arc.jsonl", ARC)
    write_jsonl(folder / "generation.jsonl", [{"prompt": "def f():", "tests": []}] * 2)
    (folder / "notes.txt").write_text("no task")
    return folder
