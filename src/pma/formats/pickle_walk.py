"""Follows a pickle's opcodes without obeying them, by kinds of values instead of values.

One code for both uses: as it is for small pickles, and compiled for large ones, because compiling costs more
than it saves for most. All that is compiled is in this module, whose date the compiler's cache looks at. What
is frequent and short is done in the loop itself, because calls cost an uncompiled walk dearly.
"""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

# A value on the walked stack is one integer: its kind in the low bits; above, for a string the place of its
# opcode, for a tuple how deep tuples nest in it.
NONE, INT, SCALAR, STRING, BYTES, GLOBAL, RECORD = 1, 2, 3, 4, 5, 6, 7
TUPLE, LIST, DICT, SET, OBJECT, LARGE_INT = 8, 9, 10, 11, 12, 13
_KIND_BITS = 4
_KIND = 15
# what may be a key or an element of a set. Hashing tuples recurses in C and can be made to collide at will
_KEYS = sum(1 << kind for kind in (NONE, INT, SCALAR, STRING, BYTES, GLOBAL, RECORD))
# what may be altered as if it were a mapping or list
_OBJECTS = 1 << OBJECT | 1 << RECORD

# what an opcode does
REFUSE, PUSH, COUNTED, STORE, FETCH, BEGIN, TAKE, CLOSE, NAME, FRAMED, STOP = range(11)
# how a walk ends
DONE, CUT, OPCODE, UNDERFLOW, MEMO, KEY, DEEP, TARGET, NAMES, INTEGER, MEMORY, VERSION, TRAILING = range(13)

MOST_STACKED = 2**19
MOST_MARKS = 1000
MOST_GLOBALS = 4096
_DEEPEST_TUPLE = 32
_LARGEST_INT_BYTES = 255
_LONGEST_NAME = 1000
_NEWEST_PROTOCOL = 5
_NEW_LINE = 10
_AGAIN_BYTES = 100  # of what takes no memory but time, and nobody needs many
_ITEM_BYTES, _ENTRY_BYTES = 8, 100  # of an element of a list or tuple, of an entry of a mapping or set
_LONG_STRING_BYTES = 2**16  # from here on a string is counted as if each byte became four

# opcodes as numbers
_TUPLE1, _TUPLE2, _TUPLE3, _TUPLE = (
    ord(o) for o in (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE)
)
_REDUCE, _NEWOBJ, _NEWOBJ_EX, _PERSID = (
    ord(o) for o in (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BINPERSID)
)
_BUILD, _SETITEM, _APPEND = (ord(o) for o in (pickle.BUILD, pickle.SETITEM, pickle.APPEND))
_SETITEMS, _APPENDS, _ADDITEMS = (ord(o) for o in (pickle.SETITEMS, pickle.APPENDS, pickle.ADDITEMS))
_LIST, _DICT, _FROZENSET = (ord(o) for o in (pickle.LIST, pickle.DICT, pickle.FROZENSET))
_POP_MARK, _DUP = (ord(o) for o in (pickle.POP_MARK, pickle.DUP))


@cache
def compiled() -> Any:
    """`follow` as machine code, kept beside the module or in the user's cache folder."""
    from numba import njit
    from numba.extending import register_jitable

    for part in (_limit, _number, _counted, _made, _altered, _take, _keys, _close, _name, _framed):
        register_jitable(part)
    register_jitable(inline="always")(_tuple)  # the most frequent: a third of the time if it were called
    try:
        return njit(nogil=True, cache=True)(follow)
    except RuntimeError:  # neither place can be written to
        return njit(nogil=True)(follow)


def follow(  # noqa: C901, PLR0915  one branch an action
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
    """Follow the opcodes to the end: (how it ended, at which byte, number of globals, memory in bytes).

    By opcode: `actions`; `kinds` pushed, or values taken; `arguments` and `memories` in bytes. Room for
    MOST_STACKED + 4 values on the `stack`, MOST_MARKS `marks`, a `memo` entry a byte, two `globals_` entries
    (places of module and name) for each of MOST_GLOBALS.
    """
    held, marked, remembered, named, spent, base, next_at = 0, 0, 0, 0, 0, 0, 0
    while next_at < end:
        at = next_at
        opcode = data[at]
        action, argument, status = actions[opcode], arguments[opcode], DONE
        next_at = at + 1 + argument
        spent += memories[opcode]
        if action == REFUSE or next_at > end or spent > budget_bytes or held >= MOST_STACKED:
            return _limit(action, next_at > end, spent > budget_bytes), at, named, spent
        if action == PUSH:
            stack[held] = kinds[opcode]
            held += 1
        elif action == STORE:
            index = _number(data, at, argument) if argument else remembered
            if index > remembered or held == base:
                return MEMO, at, named, spent
            if index == remembered:
                remembered += 1
            else:
                spent += _AGAIN_BYTES
            memo[index] = stack[held - 1]
        elif action == FETCH:
            index = _number(data, at, argument)
            if index >= remembered:
                return MEMO, at, named, spent
            stack[held] = memo[index]
            held += 1
        elif action == COUNTED:
            status, stack[held], length = _counted(kinds[opcode], data, at, argument, end)
            next_at += length
            spent += length if length < _LONG_STRING_BYTES else 4 * length
            held += 1
        elif action == BEGIN:
            if marked == MOST_MARKS:
                return DEEP, at, named, spent
            marks[marked] = base = held
            marked += 1
        elif action == TAKE:
            if held - base < kinds[opcode]:
                return UNDERFLOW, at, named, spent
            status, held = _take(opcode, stack, held)
        elif action == CLOSE:
            start = base
            base = marks[marked - 2] if marked > 1 else 0
            if marked == 0 or start - base < kinds[opcode]:
                return UNDERFLOW, at, named, spent
            marked -= 1
            spent += (held - start) * (_ITEM_BYTES if kinds[opcode] == 0 else _ENTRY_BYTES)
            status, held = _close(opcode, stack, start, held)
        elif action == NAME:
            status, next_at, held = _name(data, at, end, argument, stack, held, base, globals_, named)
            named += 1
        elif action == FRAMED:
            status = _framed(data, at, argument, end)
        else:
            whole = held == 1 and marked == 0
            return (UNDERFLOW if not whole else DONE if next_at == end else TRAILING), at, named, spent
        if status != DONE:
            return status, at, named, spent
    return CUT, end - 1, named, spent


def _limit(action: int, cut: bool, too_much: bool) -> int:
    """Which limit of all opcodes was passed."""
    if action == REFUSE:
        return OPCODE
    return CUT if cut else MEMORY if too_much else UNDERFLOW


def _number(data: Any, at: int, width: int) -> int:
    """The low four bytes of an opcode's argument of one, four or eight."""
    number: int = data[at + 1] | 0  # compiled: as wide as the others
    if width >= 4:
        number |= data[at + 2] << 8 | data[at + 3] << 16 | data[at + 4] << 24
    return number


def _counted(kind: int, data: Any, at: int, width: int, end: int) -> tuple[int, int, int]:
    """Text, bytes or an integer after its length: (how it went, the value, its length in bytes)."""
    length = _number(data, at, width)
    if width == 8 and (data[at + 5] | data[at + 6] | data[at + 7] | data[at + 8]):
        return CUT, kind, 0
    if length > end - at - 1 - width:
        return CUT, kind, 0
    if kind == STRING:
        return DONE, STRING | at << _KIND_BITS, length
    if kind == INT and length > 8:
        kind = LARGE_INT
    return (INTEGER if kind == LARGE_INT and length > _LARGEST_INT_BYTES else DONE), kind, length


def _framed(data: Any, at: int, width: int, end: int) -> int:
    """A protocol's number, of one byte, or a frame's length, of eight: how it went."""
    number = _number(data, at, width)
    if width == 1:
        return VERSION if number > _NEWEST_PROTOCOL else DONE
    high = data[at + 5] | data[at + 6] | data[at + 7] | data[at + 8]
    return CUT if high or number > end - at - 1 - width else DONE


def _name(
    data: Any, at: int, end: int, lines: int, stack: Any, held: int, base: int, globals_: Any, named: int
) -> tuple[int, int, int]:
    """A global, named in two lines or by the two values on top: (how it went, where the next opcode is,
    values on the stack afterwards).
    """
    if named == MOST_GLOBALS:
        return NAMES, at, held
    module_at = name_at = at
    next_at = at + 1
    while lines:
        if next_at >= end or next_at - at > _LONGEST_NAME:
            return NAMES, at, held
        lines -= data[next_at] == _NEW_LINE
        next_at += 1
    if next_at == at + 1:
        if held - base < 2 or stack[held - 1] & _KIND != STRING or stack[held - 2] & _KIND != STRING:
            return NAMES, at, held
        held -= 2
        module_at, name_at = stack[held] >> _KIND_BITS, stack[held + 1] >> _KIND_BITS
    globals_[2 * named], globals_[2 * named + 1] = module_at, name_at
    stack[held] = GLOBAL
    return DONE, next_at, held + 1


# What follows changes the stack: (how it went, values on the stack afterwards).


def _take(opcode: int, stack: Any, held: int) -> tuple[int, int]:
    """An opcode that takes a known number of values, which are there."""
    if opcode in (_TUPLE1, _TUPLE2, _TUPLE3):
        start = held - (1 if opcode == _TUPLE1 else 2 if opcode == _TUPLE2 else 3)
        return _tuple(stack, start, held)
    if opcode in (_REDUCE, _NEWOBJ, _NEWOBJ_EX):
        return _made(opcode, stack, held)
    if opcode == _BUILD:
        return _altered(stack, held - 1, _OBJECTS)
    if opcode == _APPEND:
        return _altered(stack, held - 1, _OBJECTS | 1 << LIST)
    if opcode == _SETITEM:
        key = _KEYS >> (stack[held - 2] & _KIND) & 1
        return _altered(stack, held - 2, _OBJECTS | 1 << DICT) if key else (KEY, held)
    if opcode == _PERSID:
        stack[held - 1] = OBJECT
        return DONE, held
    if opcode == _DUP:
        stack[held] = stack[held - 1]
        return DONE, held + 1
    return DONE, held - 1  # POP


def _close(opcode: int, stack: Any, start: int, held: int) -> tuple[int, int]:
    """An opcode that takes the values from `start` on; what it alters is there below."""
    if opcode == _TUPLE:
        return _tuple(stack, start, held)
    if opcode == _APPENDS:
        return _altered(stack, start, _OBJECTS | 1 << LIST)
    if opcode == _POP_MARK:
        return DONE, start
    if opcode == _LIST:
        stack[start] = LIST
        return DONE, start + 1
    step = 2 if opcode in (_SETITEMS, _DICT) else 1
    if (held - start) % step:
        return UNDERFLOW, held
    if not _keys(stack, start, held, step):
        return KEY, held
    if opcode == _SETITEMS:
        return _altered(stack, start, _OBJECTS | 1 << DICT)
    if opcode == _ADDITEMS:
        return _altered(stack, start, 1 << SET)
    stack[start] = DICT if opcode == _DICT else OBJECT
    return DONE, start + 1


def _tuple(stack: Any, start: int, held: int) -> tuple[int, int]:
    """A tuple of the values from `start` on."""
    depth = 0
    for i in range(start, held):
        if stack[i] & _KIND == TUPLE:
            depth = max(depth, stack[i] >> _KIND_BITS)
    stack[start] = TUPLE | (depth + 1) << _KIND_BITS
    return (DONE if depth < _DEEPEST_TUPLE else DEEP), start + 1


def _made(opcode: int, stack: Any, held: int) -> tuple[int, int]:
    """An object made by a global of a tuple of arguments, and perhaps a mapping of such."""
    start = held - (3 if opcode == _NEWOBJ_EX else 2)
    if stack[start] & _KIND != GLOBAL or stack[start + 1] & _KIND != TUPLE:
        return TARGET, held
    if opcode == _NEWOBJ_EX and stack[held - 1] & _KIND != DICT:
        return TARGET, held
    stack[start] = OBJECT if opcode == _REDUCE else RECORD
    return DONE, start + 1


def _altered(stack: Any, start: int, kinds: int) -> tuple[int, int]:
    """The value below `start` takes those from there on, if it is of one of `kinds`."""
    return (DONE if (kinds >> (stack[start - 1] & _KIND)) & 1 else TARGET), start


def _keys(stack: Any, start: int, held: int, step: int) -> bool:
    """Whether every `step`-th value from `start` on may be a key."""
    for i in range(start, held, step):  # noqa: SIM110  compiled
        if not (_KEYS >> (stack[i] & _KIND)) & 1:
            return False
    return True
