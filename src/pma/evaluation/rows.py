"""Rows of JSON, one object a line, from a user's file, plain or .xz."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pma.errors import FormatError, printable


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects in `path`, each with the number of its line; empty lines are passed over. Raises
    FormatError for a line that is none.
    """
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        lines = data.decode("utf-8").split("\n")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise FormatError(
            f"{path} is not UTF-8 text{' in .xz' if path.suffix == '.xz' else ''}: {error}"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}, line {number}: not valid JSON: {printable(str(error))}") from error
        if not isinstance(row, dict):
            raise FormatError(f"{path}, line {number}: a JSON {type(row).__name__}, expected an object")
        yield number, row
