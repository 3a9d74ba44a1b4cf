"""Reads a pickle's opcodes without obeying them: bounds every length, memo index and nesting, estimates the
memory that obeying would take, and collects the globals it names.

The scan follows kinds of values instead of values. After it Python's own unpickler can be let loose: what
could make that one allocate by a lie, recurse without end or hash for ever has been refused. The same
function runs as it is for small pickles and compiled for large ones, because compiling costs more than it
saves for most.

Source: the opcodes of protocols 2 to 5 as in Python's `pickletools`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pma.errors import FormatError, printable

# A value on the scanned stack is one integer: its kind in the low bits; above, for a string the place of its
# opcode, for a tuple how deep tuples nest in it.
_NONE, _INT, _SCALAR, _STRING, _BYTES, _GLOBAL, _RECORD = 1, 2, 3, 4, 5, 6, 7
_TUPLE, _LIST, _DICT, _SET, _OBJECT, _LARGE_INT = 8, 9, 10, 11, 12, 13
_KIND_BITS = 4
_KIND = 15
# what may be a key or an element of a set. Hashing tuples recurses in C and can be made to collide at will
_KEYS = sum(1 << kind for kind in (_NONE, _INT, _SCALAR, _STRING, _BYTES, _GLOBAL, _RECORD))

_DEEPEST_TUPLE = 32
_MOST_STACKED = 2**19
_MOST_MARKS = 1000
_MOST_GLOBALS = 4096
_LARGEST_INT_BYTES = 255
_LONGEST_NAME = 1000
_NEWEST_PROTOCOL = 5
_NEW_LINE = 10
# a small budget ends the scan early, before compiling would have paid
_COMPILE_FROM_BYTES, _COMPILE_FROM_BUDGET_BYTES = 6 * 2**20, 128 * 2**20

# what an opcode does, in the tables below
_REFUSE, _PUSH, _COUNTED, _STORE, _FETCH, _BEGIN, _TAKE, _CLOSE, _NAME, _FRAMED, _STOP = range(11)
_PUSHES = {  # opcode: (kind pushed, bytes of argument, bytes of memory)
    pickle.NONE: (_NONE, 0, 8),
    pickle.NEWTRUE: (_SCALAR, 0, 8),
    pickle.NEWFALSE: (_SCALAR, 0, 8),
    pickle.BININT: (_INT, 4, 40),
    pickle.BININT1: (_INT, 1, 8),
    pickle.BININT2: (_INT, 2, 40),
    pickle.BINFLOAT: (_SCALAR, 8, 32),
    pickle.EMPTY_TUPLE: (_TUPLE, 0, 8),
    pickle.EMPTY_LIST: (_LIST, 0, 72),
    pickle.EMPTY_DICT: (_DICT, 0, 80),
    pickle.EMPTY_SET: (_SET, 0, 232),
}
_COUNTS = {  # opcode: (kind pushed, bytes of the length, bytes of memory beside the content)
    pickle.SHORT_BINUNICODE: (_STRING, 1, 56),
    pickle.BINUNICODE: (_STRING, 4, 56),
    pickle.BINUNICODE8: (_STRING, 8, 56),
    pickle.SHORT_BINBYTES: (_BYTES, 1, 40),
    pickle.BINBYTES: (_BYTES, 4, 40),
    pickle.BINBYTES8: (_BYTES, 8, 40),
    pickle.BYTEARRAY8: (_OBJECT, 8, 64),
    pickle.LONG1: (_INT, 1, 40),
    pickle.LONG4: (_LARGE_INT, 4, 40),
}
_SPECIALS = {  # opcode: (action, values taken, bytes of argument, bytes of memory)
    pickle.MEMOIZE: (_STORE, 1, 0, 24),
    pickle.BINPUT: (_STORE, 1, 1, 24),
    pickle.LONG_BINPUT: (_STORE, 1, 4, 24),
    pickle.BINGET: (_FETCH, 0, 1, 8),
    pickle.LONG_BINGET: (_FETCH, 0, 4, 8),
    pickle.MARK: (_BEGIN, 0, 0, 8),
    pickle.TUPLE1: (_TAKE, 1, 0, 64),
    pickle.TUPLE2: (_TAKE, 2, 0, 72),
    pickle.TUPLE3: (_TAKE, 3, 0, 80),
    pickle.REDUCE: (_TAKE, 2, 0, 96),
    pickle.BUILD: (_TAKE, 2, 0, 64),
    pickle.NEWOBJ: (_TAKE, 2, 0, 96),
    pickle.NEWOBJ_EX: (_TAKE, 3, 0, 96),
    pickle.SETITEM: (_TAKE, 3, 0, 200),
    pickle.APPEND: (_TAKE, 2, 0, 40),
    pickle.BINPERSID: (_TAKE, 1, 0, 96),
    pickle.POP: (_TAKE, 1, 0, 100),  # 100 also where it takes no memory but time, and nobody needs many
    pickle.DUP: (_TAKE, 1, 0, 100),
    pickle.TUPLE: (_CLOSE, 0, 0, 56),
    pickle.LIST: (_CLOSE, 0, 0, 72),
    pickle.DICT: (_CLOSE, 0, 0, 200),
    pickle.FROZENSET: (_CLOSE, 0, 0, 232),
    pickle.POP_MARK: (_CLOSE, 0, 0, 100),
    pickle.SETITEMS: (_CLOSE, 1, 0, 120),
    pickle.APPENDS: (_CLOSE, 1, 0, 40),
    pickle.ADDITEMS: (_CLOSE, 1, 0, 64),
    pickle.GLOBAL: (_NAME, 0, 2, 100),
    pickle.STACK_GLOBAL: (_NAME, 2, 0, 100),
    pickle.FRAME: (_FRAMED, 0, 8, 100),
    pickle.PROTO: (_FRAMED, 0, 1, 100),
    pickle.STOP: (_STOP, 0, 0, 0),
}
_ITEM_BYTES, _ENTRY_BYTES = 8, 100  # of an element of a list or tuple, of an entry of a mapping or set
_LONG_STRING_BYTES = 2**16  # from here on a string is counted as if each byte became four

# opcodes as numbers
_TUPLE1, _TUPLE2, _TUPLE3 = pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]
_REDUCE, _BUILD, _NEWOBJ, _NEWOBJ_EX = (
    pickle.REDUCE[0],
    pickle.BUILD[0],
    pickle.NEWOBJ[0],
    pickle.NEWOBJ_EX[0],
)
_SETITEM, _APPEND, _BINPERSID, _DUP = pickle.SETITEM[0], pickle.APPEND[0], pickle.BINPERSID[0], pickle.DUP[0]
_SETITEMS, _APPENDS, _ADDITEMS, _POP_MARK = (
    pickle.SETITEMS[0],
    pickle.APPENDS[0],
    pickle.ADDITEMS[0],
    pickle.POP_MARK[0],
)
_TUPLE_OPCODE, _LIST_OPCODE, _DICT_OPCODE, _FROZENSET = (
    pickle.TUPLE[0],
    pickle.LIST[0],
    pickle.DICT[0],
    pickle.FROZENSET[0],
)

# how a scan ends
(
    _DONE,
    _CUT,
    _OPCODE,
    _UNDERFLOW,
    _MEMO,
    _KEY,
    _DEEP,
    _TARGET,
    _NAMES,
    _INTEGER,
    _MEMORY,
    _VERSION,
    _TRAILING,
) = range(13)
_REASONS = {
    _CUT: "it ends, or promises more bytes than there are,",
    _OPCODE: "an opcode that no checkpoint needs",
    _UNDERFLOW: "an opcode that takes more than the stack holds, or a stack too large,",
    _MEMO: "a memo index out of order",
    _KEY: "a key of a mapping or set that is neither text, number nor record",
    _DEEP: "values nested too deeply",
    _TARGET: "an opcode that alters what may not be altered",
    _NAMES: "too many globals, or a global whose name is not plain text,",
    _INTEGER: "an integer too long to be believable",
    _MEMORY: "more values than are believable for it",
    _VERSION: "a protocol newer than 5",
    _TRAILING: "bytes after the end",
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
            np.zeros(n, np.int64) for n in (_MOST_STACKED + 4, _MOST_MARKS, 2 * _MOST_GLOBALS)
        )
        tables, view, follow = _TABLES, np.frombuffer(data, np.uint8), _compiled()
    else:
        stack, marks, found = ([0] * n for n in (_MOST_STACKED + 4, _MOST_MARKS, 2 * _MOST_GLOBALS))
        tables, view, follow, memo = [t.tolist() for t in _TABLES], data, _follow, memoryview(memo)
    status, at, count, spent = follow(view, len(data), *tables, stack, marks, memo, found, budget_bytes)
    if status != _DONE:
        shown = f" ({_opcode_name(data[at])})" if status in (_OPCODE, _TARGET, _UNDERFLOW) else ""
        raise FormatError(f"{where} is a pickle with {_REASONS[status]} at byte {at}{shown}; it is refused")
    names = tuple(_dotted(data, int(found[2 * i]), int(found[2 * i + 1]), where) for i in range(count))
    return Scan(globals=names, memory_bytes=spent)


def _opcode_name(opcode: int) -> str:
    for name in pickle.__all__:
        if name.isupper() and getattr(pickle, name, None) == bytes([opcode]):
            return name
    return f"opcode {opcode:#04x}"


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
    width = _COUNTS[data[at : at + 1]][1]
    length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
    return data[at + 1 + width : at + 1 + width + length]


def _tables() -> tuple[Any, ...]:
    """By opcode: what it does, the kind it pushes or the values it takes, bytes of argument, memory."""
    action, kind, argument, memory = (np.zeros(256, np.int64) for _ in range(4))
    for does, rows in ((_PUSH, _PUSHES), (_COUNTED, _COUNTS)):
        for opcode, row in rows.items():
            action[opcode[0]] = does
            kind[opcode[0]], argument[opcode[0]], memory[opcode[0]] = row
    for opcode, special in _SPECIALS.items():
        action[opcode[0]], kind[opcode[0]], argument[opcode[0]], memory[opcode[0]] = special
    return action, kind, argument, memory


_TABLES = _tables()


@cache
def _compiled() -> Any:
    """`_follow` as machine code, kept beside the module or in the user's cache folder."""
    from numba import njit
    from numba.extending import register_jitable

    register_jitable(_few)
    register_jitable(_close)
    try:
        return njit(nogil=True, cache=True)(_follow)
    except RuntimeError:  # neither place can be written to
        return njit(nogil=True)(_follow)


# One loop over all opcodes, long as it is: calls would triple the time of the uncompiled one.
def _follow(  # noqa: C901, PLR0915
    data: Any,
    end: int,
    actions: Any,
    kinds: Any,
    arguments: Any,
    memories: Any,
    stack: Any,
    marks: Any,
    memo: Any,
    globals_: Any,
    budget_bytes: int,
) -> tuple[int, int, int, int]:
    """Follow the opcodes to the end: (how it ended, at which byte, number of globals, memory in bytes)."""
    held, marked, remembered, named, spent, base = 0, 0, 0, 0, 0, 0
    next_at = 0
    while next_at < end:
        at = next_at
        opcode = data[at]
        action, argument = actions[opcode], arguments[opcode]
        next_at = at + 1 + argument
        spent += memories[opcode]
        if action == _REFUSE:
            return _OPCODE, at, named, spent
        if next_at > end:
            return _CUT, at, named, spent
        if spent > budget_bytes:
            return _MEMORY, at, named, spent
        if held >= _MOST_STACKED:
            return _UNDERFLOW, at, named, spent
        if action == _PUSH:
            stack[held] = kinds[opcode]
            held += 1
        elif action == _STORE:
            index = remembered
            if argument:
                index = data[at + 1] | 0  # compiled: as wide as the others
                if argument == 4:
                    index |= data[at + 2] << 8 | data[at + 3] << 16 | data[at + 4] << 24
            if index > remembered or held == base:
                return _MEMO, at, named, spent
            if index == remembered:
                remembered += 1
            else:
                spent += 100
            memo[index] = stack[held - 1]
        elif action == _FETCH:
            index = data[at + 1] | 0  # compiled: as wide as the others
            if argument == 4:
                index |= data[at + 2] << 8 | data[at + 3] << 16 | data[at + 4] << 24
            if index >= remembered:
                return _MEMO, at, named, spent
            stack[held] = memo[index]
            held += 1
        elif action == _COUNTED:
            length = data[at + 1] | 0
            if argument >= 4:
                length |= data[at + 2] << 8 | data[at + 3] << 16 | data[at + 4] << 24
            if argument == 8 and (data[at + 5] | data[at + 6] | data[at + 7] | data[at + 8]):
                return _CUT, at, named, spent
            if length > end - next_at:
                return _CUT, at, named, spent
            next_at += length
            kind = kinds[opcode]
            spent += length if length < _LONG_STRING_BYTES else 4 * length
            if kind == _STRING:
                kind |= at << _KIND_BITS
            elif kind == _INT and length > 8:
                kind = _LARGE_INT
            if kind == _LARGE_INT and length > _LARGEST_INT_BYTES:
                return _INTEGER, at, named, spent
            stack[held] = kind
            held += 1
        elif action == _BEGIN:
            if marked == _MOST_MARKS:
                return _DEEP, at, named, spent
            marks[marked] = base = held
            marked += 1
        elif action == _TAKE:
            if held - base < kinds[opcode]:
                return _UNDERFLOW, at, named, spent
            status, held = _few(opcode, stack, held)
            if status != _DONE:
                return status, at, named, spent
        elif action == _CLOSE:
            if marked == 0:
                return _UNDERFLOW, at, named, spent
            start = marks[marked - 1]
            marked -= 1
            base = marks[marked - 1] if marked else 0
            if start - base < kinds[opcode]:
                return _UNDERFLOW, at, named, spent
            spent += (held - start) * (_ITEM_BYTES if kinds[opcode] == 0 else _ENTRY_BYTES)
            status, held = _close(opcode, stack, start, held)
            if status != _DONE:
                return status, at, named, spent
        elif action == _NAME:
            if named == _MOST_GLOBALS:
                return _NAMES, at, named, spent
            if argument:  # two lines; the argument stands for their ends
                lines = 0
                next_at = at + 1
                while lines < 2:
                    if next_at >= end or next_at - at > _LONGEST_NAME:
                        return _NAMES, at, named, spent
                    if data[next_at] == _NEW_LINE:
                        lines += 1
                    next_at += 1
                globals_[2 * named] = globals_[2 * named + 1] = at
            else:
                if (
                    held - base < 2
                    or stack[held - 1] & _KIND != _STRING
                    or stack[held - 2] & _KIND != _STRING
                ):
                    return _NAMES, at, named, spent
                globals_[2 * named + 1] = stack[held - 1] >> _KIND_BITS
                globals_[2 * named] = stack[held - 2] >> _KIND_BITS
                held -= 2
            named += 1
            stack[held] = _GLOBAL
            held += 1
        elif action == _FRAMED:
            length = data[at + 1] | 0
            if argument == 1:
                if length > _NEWEST_PROTOCOL:
                    return _VERSION, at, named, spent
            else:
                length |= data[at + 2] << 8 | data[at + 3] << 16 | data[at + 4] << 24
                if data[at + 5] | data[at + 6] | data[at + 7] | data[at + 8] or length > end - next_at:
                    return _CUT, at, named, spent
        else:  # the end
            if held != 1 or marked:
                return _UNDERFLOW, at, named, spent
            return (_DONE if next_at == end else _TRAILING), at, named, spent
    return _CUT, end - 1, named, spent


def _few(opcode: int, stack: Any, held: int) -> tuple[int, int]:  # noqa: C901
    """An opcode that takes a known number of values: (how it went, values on the stack afterwards)."""
    if opcode in (_TUPLE1, _TUPLE2, _TUPLE3):
        start = held - (1 if opcode == _TUPLE1 else 2 if opcode == _TUPLE2 else 3)
        return _close(_TUPLE_OPCODE, stack, start, held)
    top, below = stack[held - 1] & _KIND, _NONE
    if held > 1:
        below = stack[held - 2] & _KIND
    if opcode in (_REDUCE, _NEWOBJ):
        if below != _GLOBAL or top != _TUPLE:
            return _TARGET, held
        stack[held - 2] = _OBJECT if opcode == _REDUCE else _RECORD
        return _DONE, held - 1
    if opcode == _BUILD:
        return (_DONE if below in (_OBJECT, _RECORD) else _TARGET), held - 1
    if opcode == _SETITEM:
        if not (_KEYS >> below) & 1:
            return _KEY, held
        target = stack[held - 3] & _KIND
        return (_DONE if target in (_DICT, _OBJECT, _RECORD) else _TARGET), held - 2
    if opcode == _APPEND:
        return (_DONE if below in (_LIST, _OBJECT, _RECORD) else _TARGET), held - 1
    if opcode == _NEWOBJ_EX:
        if stack[held - 3] & _KIND != _GLOBAL or below != _TUPLE or top != _DICT:
            return _TARGET, held
        stack[held - 3] = _RECORD
        return _DONE, held - 2
    if opcode == _BINPERSID:
        stack[held - 1] = _OBJECT
        return _DONE, held
    if opcode == _DUP:
        stack[held] = stack[held - 1]
        return _DONE, held + 1
    return _DONE, held - 1  # POP


def _close(opcode: int, stack: Any, start: int, held: int) -> tuple[int, int]:  # noqa: C901
    """An opcode that takes the values from `start` on: (how it went, values on the stack afterwards)."""
    if opcode == _TUPLE_OPCODE:
        depth = 0
        for i in range(start, held):
            if stack[i] & _KIND == _TUPLE:
                depth = max(depth, stack[i] >> _KIND_BITS)
        stack[start] = _TUPLE | (depth + 1) << _KIND_BITS
        return (_DONE if depth < _DEEPEST_TUPLE else _DEEP), start + 1
    if opcode == _LIST_OPCODE:
        stack[start] = _LIST
        return _DONE, start + 1
    step = 2 if opcode in (_SETITEMS, _DICT_OPCODE) else 1
    if (held - start) % step:
        return _UNDERFLOW, held
    if opcode != _APPENDS and opcode != _POP_MARK:
        for i in range(start, held, step):
            if not (_KEYS >> (stack[i] & _KIND)) & 1:
                return _KEY, held
    if opcode in (_DICT_OPCODE, _FROZENSET):
        stack[start] = _DICT if opcode == _DICT_OPCODE else _OBJECT
        return _DONE, start + 1
    if opcode == _POP_MARK:
        return _DONE, start
    target = stack[start - 1] & _KIND
    own = _DICT if opcode == _SETITEMS else _LIST if opcode == _APPENDS else _SET
    record = opcode != _ADDITEMS and (target in (_OBJECT, _RECORD))
    return (_DONE if target == own or record else _TARGET), start
