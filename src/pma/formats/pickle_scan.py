"""Scans a pickle without obeying it: bounds every length, memo index and nesting, estimates the memory that
obeying would take, and collects the globals it names.

After a scan Python's own unpickler can be let loose: what could make that one allocate by a lie, recurse
without end or hash for ever has been refused.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np

from pma.errors import FormatError, printable
from pma.formats import pickle_walk as walk
from pma.formats.pickle_opcodes import TABLES, length_bytes, opcode_name

# a small budget ends the scan early, before compiling would have paid
_COMPILE_FROM_BYTES, _COMPILE_FROM_BUDGET_BYTES = 6 * 2**20, 128 * 2**20

_REASONS = {
    walk.CUT: "it ends, or promises more bytes than there are,",
    walk.OPCODE: "an opcode that no checkpoint needs",
    walk.UNDERFLOW: "an opcode that takes more than the stack holds, or a stack too large,",
    walk.MEMO: "a memo index out of order",
    walk.KEY: "a key of a mapping or set that is neither text, number nor record",
    walk.DEEP: "values nested too deeply",
    walk.TARGET: "an opcode that alters what may not be altered",
    walk.NAMES: "too many globals, or a global whose name is not plain text,",
    walk.INTEGER: "an integer too long to be believable",
    walk.MEMORY: "more values than are believable for it",
    walk.VERSION: "a protocol newer than 5",
    walk.TRAILING: "bytes after the end",
}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a pickle would do: dotted names it wants, an estimate of the memory its values take."""

    globals: tuple[str, ...]
    memory_bytes: int


def scan(data: bytes, where: str, budget_bytes: int) -> Scan:
    """Check a whole pickle. `budget_bytes`: the most memory that its values may take, about.

    Raises FormatError at the first opcode that is not acceptable.
    """
    stack: Any
    marks: Any
    found: Any
    tables: Any
    view: Any
    # pages of the memo that are not used are never made
    memo: Any = np.zeros(len(data) + 1, np.int64)
    if len(data) >= _COMPILE_FROM_BYTES and budget_bytes >= _COMPILE_FROM_BUDGET_BYTES:
        stack, marks, found = (
            np.zeros(n, np.int64) for n in (walk.MOST_STACKED + 4, walk.MOST_MARKS, 2 * walk.MOST_GLOBALS)
        )
        tables, view, follow = TABLES, np.frombuffer(data, np.uint8), walk.compiled()
    else:
        stack, marks, found = (
            [0] * n for n in (walk.MOST_STACKED + 4, walk.MOST_MARKS, 2 * walk.MOST_GLOBALS)
        )
        tables, view, follow, memo = [t.tolist() for t in TABLES], data, walk.follow, memoryview(memo)
    status, at, count, spent = follow(view, len(data), *tables, stack, marks, memo, found, budget_bytes)
    if status != walk.DONE:
        shown = f" ({opcode_name(data[at])})" if status in (walk.OPCODE, walk.TARGET, walk.UNDERFLOW) else ""
        raise FormatError(f"{where} is a pickle with {_REASONS[status]} at byte {at}{shown}; it is refused")
    names = tuple(_dotted(data, int(found[2 * i]), int(found[2 * i + 1]), where) for i in range(count))
    return Scan(globals=names, memory_bytes=spent)


def _dotted(data: bytes, module_at: int, name_at: int, where: str) -> str:
    if data[module_at : module_at + 1] == pickle.GLOBAL:  # two lines
        middle = data.index(b"\n", module_at)
        module, name = data[module_at + 1 : middle], data[middle + 1 : data.index(b"\n", middle + 1)]
    else:
        module, name = _string_at(data, module_at), _string_at(data, name_at)
    try:
        return f"{module.decode('utf-8')}.{name.decode('utf-8')}"
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} names a global that is not text: {printable(repr(name))}") from error


def _string_at(data: bytes, at: int) -> bytes:
    width = length_bytes(data[at : at + 1])
    length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
    return data[at + 1 + width : at + 1 + width + length]
