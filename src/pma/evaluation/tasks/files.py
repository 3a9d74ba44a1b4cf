"""Tasks from local JSONL files: read, checked, and brought into one of two kinds, choices or a target.

The files are data from elsewhere: nothing in them is a template, and every line is checked before a model is
made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pma.errors import FormatError, InputError, UsageError, printable
from pma.evaluation.rows import read_rows
from pma.results import content_key

SUFFIXES = (".jsonl", ".jsonl.xz")
Item = dict[str, Any]


class _Wrong(Exception):
    """What is wrong with a line, in a few words."""


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """Items of one file. kind "choices": context, choices, gold (which is right); "target": context, target.

    `delimiter` stands between a context and what is scored: a space, as in the harness, or nothing where the
    file has white space there.
    """

    name: str
    kind: Literal["choices", "target"]
    delimiter: str
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """Tells tasks apart by content, wherever their files lie."""
        return content_key([self.kind, self.delimiter, self.items])


def is_path(spec: str) -> bool:
    """Whether a value of --tasks is meant as a file or folder, not as the name of a task of the harness."""
    return spec.endswith(SUFFIXES) or "/" in spec or Path(spec).is_dir()


def read_tasks(
    paths: Sequence[Path], limit: int | None = None
) -> tuple[list[LocalTask], list[tuple[Path, str]]]:
    """The tasks of files and of the files in folders; and which files of folders were left out, and why.

    `limit`: at most so many items of each file, spread evenly over it. Raises InputError for what is missing
    or holds no task, FormatError for a file whose lines are wrong, UsageError for two tasks of one name.
    """
    tasks: dict[str, LocalTask] = {}
    left_out = []
    for path in paths:
        for file in _files(path):
            task = _read(file, limit)
            if task is None:
                if path.is_file():
                    raise FormatError(
                        f"{file}: its fields are those of no task that is known; see docs/tasks.md"
                    )
                left_out.append((file, "its fields are those of no task that is known"))
                continue
            if task.name in tasks:
                raise UsageError(f"{file}: there are two tasks named {task.name}; rename a file")
            tasks[task.name] = task
    if not tasks:
        raise InputError(
            f"{', '.join(map(str, paths))} holds no task; expected .jsonl files as in docs/tasks.md"
        )
    return list(tasks.values()), left_out


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
    elif path.exists():
        yield path
    else:
        raise InputError(f"{path} does not exist; expected a .jsonl file of a task or a folder of them")


def _read(path: Path, limit: int | None) -> LocalTask | None:
    """The task of a file; None where its first line has the fields of no task."""
    shape: Callable[[Mapping[str, Any]], Item] | None = None
    items = []
    for number, row in read_rows(path):
        shape = shape or _shape(row)
        if shape is None:
            return None
        try:
            items.append(_checked(shape(row)))
        except (_Wrong, KeyError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise FormatError(f"{path}, line {number}: {what}; see docs/tasks.md") from error
    if len(items) < 2:
        raise FormatError(f"{path} holds {len(items)} items; a score with an error needs at least two")
    kind: Literal["choices", "target"] = "choices" if "choices" in items[0] else "target"
    if limit is not None and limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.name.removesuffix(".xz").removesuffix(".jsonl"))
    joined = all(map(_is_joined, items))
    return LocalTask(name=name, kind=kind, delimiter="" if joined else " ", items=tuple(items))


def _multiple_choice(row: Mapping[str, Any]) -> Item:
    return {"context": row["context"], "choices": row["choices"], "gold": row["gold"]}


def _target(row: Mapping[str, Any]) -> Item:
    return {"context": row["context"], "target": row["target"]}


def _pair(row: Mapping[str, Any]) -> Item:
    return {"context": "", "choices": [row["good"], row["bad"]], "gold": 0}


def _question(row: Mapping[str, Any]) -> Item:
    """ARC's own form; the prompt is that of the harness."""
    choices = row["choices"]
    texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise _Wrong("choices is not {text: […], label: […]} of equal lengths")
    if row["answerKey"] not in labels:
        raise _Wrong("answerKey is none of choices.label")
    context = f"Question: {_text(row['question'], 'question')}\nAnswer:"
    return {"context": context, "choices": texts, "gold": labels.index(row["answerKey"])}


_SHAPES: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Item]], ...] = (
    (frozenset({"context", "choices", "gold"}), _multiple_choice),
    (frozenset({"context", "target"}), _target),
    (frozenset({"good", "bad"}), _pair),
    (frozenset({"question", "choices", "answerKey"}), _question),
)


def _shape(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Item] | None:
    return next((shape for fields, shape in _SHAPES if fields <= row.keys()), None)


def _checked(item: Item) -> Item:
    _text(item["context"], "context")
    if "target" in item:
        if not _text(item["target"], "target").strip():
            raise _Wrong("target is empty")
        return item
    choices, gold = item["choices"], item["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise _Wrong("choices is not a list of at least two")
    if not all(_text(choice, "a choice").strip() for choice in choices):
        raise _Wrong("a choice is empty")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise _Wrong(
            f"gold is {printable(repr(gold), 40)}, expected a whole number from 0 to {len(choices) - 1}"
        )
    return item


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{name} is a JSON {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Wrong(f"{name} holds half a surrogate pair") from error
    return value


def _is_joined(item: Item) -> bool:
    """Whether white space stands between context and what is scored already."""
    wanted = item["choices"] if "choices" in item else [item["target"]]
    return item["context"][-1:].isspace() or all(text[0].isspace() for text in wanted)
