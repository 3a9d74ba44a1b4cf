"""JSON from untrusted files: one object, no name twice, no more bytes than are believable, in the file and in
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pma.errors import FormatError, printable

#: what a value may take in memory if nothing else is said; a hundred thousand names with a few numbers each
MOST_MEMORY_BYTES = 64 * 2**20
# what a list, a dictionary, an item and half a text take at least, by the sign that each needs; a list of
# millions of empty lists takes forty times the memory that its text does
_COSTS = ((b"[", 64), (b"{", 200), (b",", 40), (b'"', 20))
_CHUNK_BYTES = 2**20


def load_object(path: Path, largest_bytes: int, most_memory_bytes: int = MOST_MEMORY_BYTES) -> dict[str, Any]:
    """The JSON object in an untrusted file. Raises FormatError for anything else."""
    size_bytes = path.stat().st_size
    if size_bytes > largest_bytes:
        raise FormatError(
            f"{path} has {size_bytes} bytes; more than {largest_bytes} is not believable for it"
        )
    if isinstance(path, Path):  # a file of this machine is not even held before that is known
        _check_memory(_chunks(path), str(path), most_memory_bytes)
    return parse_object(path.read_bytes(), str(path), most_memory_bytes)


def parse_object(
    text: bytes | bytearray, where: str, most_memory_bytes: int = MOST_MEMORY_BYTES
) -> dict[str, Any]:
    """The JSON object in `text`; `where` starts the message of an error. Raises FormatError."""
    _check_memory([text], where, most_memory_bytes)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def refuse_above(budget_bytes: int, text: bytes | bytearray, where: str) -> None:
    """Raises FormatError where parsing `text` may take more than `budget_bytes` of memory.

    An estimate from above, told by counting what JSON is made of. Three keys of an object are free: entries
    of a header have as many, and names that recur are held once.
    """
    width = 1 if text.isascii() else 4
    objects, lists, keys, values, quotes = (text.count(mark) for mark in (b"{", b"[", b":", b",", b'"'))
    free = 3 * objects
    names_and_strings = 170 * max(0, keys - free) + 55 * max(0, quotes // 2 - free)
    marks = 190 * objects + 90 * lists + 36 * values + 30 * keys
    if (1 + 2 * width) * len(text) + marks + names_and_strings > budget_bytes:
        raise FormatError(
            f"{where} holds more names and values than are believable for it: they would take more than "
            f"{budget_bytes} bytes of memory"
        )


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _check_memory(chunks: Iterable[bytes | bytearray], where: str, most_bytes: int) -> None:
    needed = sum(len(chunk) + sum(cost * chunk.count(sign) for sign, cost in _COSTS) for chunk in chunks)
    if needed > most_bytes:
        raise FormatError(
            f"{where}: its JSON would take {needed} bytes of memory; more than {most_bytes} is not believable"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # a name that occurs twice would silently hide the first of the two
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the name {name[:100]!r} occurs twice")
        seen[name] = value
    return seen
