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


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` starts the message of an error. Raises FormatError."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # a name that occurs twice would silently hide the first of the two
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the name {name[:100]!r} occurs twice")
        seen[name] = value
    return seen
