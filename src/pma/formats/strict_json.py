"""JSON from untrusted files: one object, no name twice, no more bytes than are believable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pma.errors import FormatError, printable


def load_object(path: Path, largest_bytes: int) -> dict[str, Any]:
    """The JSON object in a small untrusted file. Raises FormatError for anything else."""
    size_bytes = path.stat().st_size
    if size_bytes > largest_bytes:
        raise FormatError(
            f"{path} has {size_bytes} bytes; more than {largest_bytes} is not believable for it"
        )
    return parse_object(path.read_bytes(), str(path))


def parse_object(text: bytes | bytearray, where: str, *, budget_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object in `text`; `where` starts the message of an error. Raises FormatError.

    `budget_bytes`: about how much memory its values may take; more is refused before it is parsed.
    """
    if budget_bytes is not None and _estimate_bytes(text) > budget_bytes:
        raise FormatError(
            f"{where} holds more names and values than are believable for it: they would take more than "
            f"{budget_bytes} bytes of memory"
        )
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def _estimate_bytes(text: bytes | bytearray) -> int:
    """Memory that parsing takes, from above, told by counting what JSON is made of.

    Three keys of an object are free: entries of a header have as many, and names that recur are held once.
    """
    width = 1 if text.isascii() else 4
    objects, lists, keys, values, quotes = (text.count(mark) for mark in (b"{", b"[", b":", b",", b'"'))
    free = 3 * objects
    names_and_strings = 170 * max(0, keys - free) + 55 * max(0, quotes // 2 - free)
    return (
        (1 + 2 * width) * len(text) + 190 * objects + 90 * lists + 36 * values + 30 * keys + names_and_strings
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # a name that occurs twice would silently hide the first of the two
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the name {name[:100]!r} occurs twice")
        seen[name] = value
    return seen
