"""Rows of text logs, in written order: a Trainer's `trainer_state.json`, JSON lines, CSV. Nothing in them is
executed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pma.errors import FormatError, printable
from pma.formats.strict_json import load_object

LARGEST_LOG_BYTES = 512 * 2**20
_LARGEST_STATE_BYTES = 256 * 2**20
_MOST_COLUMNS = 10_000

Notes = list[str]


def trainer_state_rows(path: Path) -> list[dict[str, Any]]:
    """The entries of `log_history`, which carry a Trainer's own names. Raises FormatError where there is
    none.
    """
    state = load_object(path, _LARGEST_STATE_BYTES)
    history = state.get("log_history")
    if not isinstance(history, list):
        raise FormatError(f"{path} has no list log_history; expected what the transformers Trainer writes")
    return [entry for entry in history if isinstance(entry, dict)]


def json_rows(path: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; lines that are none are counted in `notes`.

    Raises FormatError where most lines are no JSON objects.
    """
    lines = _text(path).split("\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    good = bad = 0
    for index, line in enumerate(lines[: last + 1]):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            good += 1
            yield value
        elif index == last and index == len(lines) - 1:
            notes.append(f"the last line of {path.name} is cut short and was left out")
        else:
            bad += 1
    if bad > good:
        raise FormatError(f"{path}: {bad} of {bad + good} lines are no JSON objects; expected one a line")
    if bad:
        notes.append(f"{bad} lines of {path.name} are no JSON objects and were left out")


def csv_rows(path: Path, notes: Notes) -> Iterator[dict[str, str]]:
    """The rows of a table whose first line names its columns, separated by commas, semicolons or tabs.

    A last line without a line break is being written: its last number may be cut, so it is left out.
    """
    text = _text(path)
    if not text.endswith(("\n", "\r")):
        text = text[: text.rfind("\n") + 1]
        notes.append(f"the last line of {path.name} has no line break: it is being written, and was left out")
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    reader = csv.reader(text.splitlines(), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        short = 0
        for cells in reader:
            if len(cells) != len(header):
                short += bool(cells)
            else:
                yield dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        raise FormatError(f"{path} is no table: {printable(str(error))}") from error
    if short:
        notes.append(f"{short} lines of {path.name} have another number of cells and were left out")


def column_names(path: Path, head: bytes) -> set[str]:
    """The names of the columns in the first bytes of a text log, for a guess at what the file is."""
    lines = head.decode("utf-8-sig", errors="replace").split("\n")
    if path.suffix == ".csv":
        separator = max(",;\t", key=lines[0].count)
        return {name.strip().strip('"') for name in lines[0].split(separator)}
    names: set[str] = set()
    for line in lines[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        names |= value.keys() if isinstance(value, dict) else set()
    return names


def _check_header(path: Path, header: list[str]) -> None:
    if not 2 <= len(header) <= _MOST_COLUMNS:
        raise FormatError(
            f"{path}: its first line names {len(header)} columns; expected a table with step and loss"
        )
    twice = next((name for index, name in enumerate(header) if name and name in header[:index]), None)
    if twice is not None:
        raise FormatError(f"{path}: the column {printable(twice)!r} occurs twice")


def _text(path: Path) -> str:
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise FormatError(f"{path} is empty; expected a training log")
    if size_bytes > LARGEST_LOG_BYTES:
        raise FormatError(
            f"{path} has {size_bytes} bytes; more than {LARGEST_LOG_BYTES} is not read. Give a part of it"
        )
    return path.read_bytes().decode("utf-8-sig", errors="replace")
