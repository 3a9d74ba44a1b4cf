"""The opcodes of pickles, protocols 2 to 5, as `pickle_walk` needs them: what each does to the stack, how
long it is, what memory obeying it takes. An opcode that is not here refuses the file.

Source: Python's `pickletools`.
"""

from __future__ import annotations

import pickle

import numpy as np
from numpy.typing import NDArray

from pma.formats import pickle_walk as walk

_PUSHES = {  # opcode: (kind pushed, bytes of argument, bytes of memory)
    pickle.NONE: (walk.NONE, 0, 8),
    pickle.NEWTRUE: (walk.SCALAR, 0, 8),
    pickle.NEWFALSE: (walk.SCALAR, 0, 8),
    pickle.BININT: (walk.INT, 4, 40),
    pickle.BININT1: (walk.INT, 1, 8),
    pickle.BININT2: (walk.INT, 2, 40),
    pickle.BINFLOAT: (walk.SCALAR, 8, 32),
    pickle.EMPTY_TUPLE: (walk.TUPLE, 0, 8),
    pickle.EMPTY_LIST: (walk.LIST, 0, 72),
    pickle.EMPTY_DICT: (walk.DICT, 0, 80),
    pickle.EMPTY_SET: (walk.SET, 0, 232),
}
_COUNTS = {  # opcode: (kind pushed, bytes of the length, bytes of memory beside the content)
    pickle.SHORT_BINUNICODE: (walk.STRING, 1, 56),
    pickle.BINUNICODE: (walk.STRING, 4, 56),
    pickle.BINUNICODE8: (walk.STRING, 8, 56),
    pickle.SHORT_BINBYTES: (walk.BYTES, 1, 40),
    pickle.BINBYTES: (walk.BYTES, 4, 40),
    pickle.BINBYTES8: (walk.BYTES, 8, 40),
    pickle.BYTEARRAY8: (walk.OBJECT, 8, 64),
    pickle.LONG1: (walk.INT, 1, 40),
    pickle.LONG4: (walk.LARGE_INT, 4, 40),
}
_SPECIALS = {  # opcode: (action, values taken, bytes of argument, bytes of memory)
    pickle.MEMOIZE: (walk.STORE, 1, 0, 24),
    pickle.BINPUT: (walk.STORE, 1, 1, 24),
    pickle.LONG_BINPUT: (walk.STORE, 1, 4, 24),
    pickle.BINGET: (walk.FETCH, 0, 1, 8),
    pickle.LONG_BINGET: (walk.FETCH, 0, 4, 8),
    pickle.MARK: (walk.BEGIN, 0, 0, 8),
    pickle.TUPLE1: (walk.TAKE, 1, 0, 64),
    pickle.TUPLE2: (walk.TAKE, 2, 0, 72),
    pickle.TUPLE3: (walk.TAKE, 3, 0, 80),
    pickle.REDUCE: (walk.TAKE, 2, 0, 96),
    pickle.BUILD: (walk.TAKE, 2, 0, 64),
    pickle.NEWOBJ: (walk.TAKE, 2, 0, 96),
    pickle.NEWOBJ_EX: (walk.TAKE, 3, 0, 96),
    pickle.SETITEM: (walk.TAKE, 3, 0, 200),
    pickle.APPEND: (walk.TAKE, 2, 0, 40),
    pickle.BINPERSID: (walk.TAKE, 1, 0, 96),
    pickle.POP: (walk.TAKE, 1, 0, 100),  # 100 also where it takes no memory but time, and nobody needs many
    pickle.DUP: (walk.TAKE, 1, 0, 100),
    pickle.TUPLE: (walk.CLOSE, 0, 0, 56),
    pickle.LIST: (walk.CLOSE, 0, 0, 72),
    pickle.DICT: (walk.CLOSE, 0, 0, 200),
    pickle.FROZENSET: (walk.CLOSE, 0, 0, 232),
    pickle.POP_MARK: (walk.CLOSE, 0, 0, 100),
    pickle.SETITEMS: (walk.CLOSE, 1, 0, 120),
    pickle.APPENDS: (walk.CLOSE, 1, 0, 40),
    pickle.ADDITEMS: (walk.CLOSE, 1, 0, 64),
    pickle.GLOBAL: (walk.NAME, 0, 2, 100),
    pickle.STACK_GLOBAL: (walk.NAME, 2, 0, 100),
    pickle.FRAME: (walk.FRAMED, 0, 8, 100),
    pickle.PROTO: (walk.FRAMED, 0, 1, 100),
    pickle.STOP: (walk.STOP, 0, 0, 0),
}


def _tables() -> tuple[NDArray[np.int64], ...]:
    """By opcode: what it does, the kind it pushes or the values it takes, bytes of argument, memory."""
    action, kind, argument, memory = (np.zeros(256, np.int64) for _ in range(4))
    for does, rows in ((walk.PUSH, _PUSHES), (walk.COUNTED, _COUNTS)):
        for opcode, row in rows.items():
            action[opcode[0]] = does
            kind[opcode[0]], argument[opcode[0]], memory[opcode[0]] = row
    for opcode, special in _SPECIALS.items():
        action[opcode[0]], kind[opcode[0]], argument[opcode[0]], memory[opcode[0]] = special
    return action, kind, argument, memory


#: as `pickle_walk.follow` takes them
TABLES = _tables()


def opcode_name(opcode: int) -> str:
    """Python's name of an opcode, or its number."""
    for name in pickle.__all__:
        if name.isupper() and getattr(pickle, name, None) == bytes([opcode]):
            return name
    return f"opcode {opcode:#04x}"


def length_bytes(opcode: bytes) -> int:
    """How many bytes tell the length of what a counted opcode holds."""
    return _COUNTS[opcode][1]
