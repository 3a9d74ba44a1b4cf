"""Unpickling for files nobody vouches for: exact names only, nothing imported, nothing run.

A pickle names functions and classes and says how to call them. Here each name it may use stands for
something of ours: a harmless function for plain containers, paths and numbers, a `Record` for a class that a
format lists. Any other name refuses the file. The opcodes are scanned first (`pickle_scan`), so that no file
makes Python's unpickler allocate, recurse or hash without bound.
"""

from __future__ import annotations

import gc
import io
import pickle
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, final

from pma.errors import FormatError, printable
from pma.formats import hostile_names
from pma.formats.pickle_scan import scan

#: what the values of a pickle may take, unless a caller allows more
BUDGET_BYTES = 40 * 2**20
_GETATTR = ("builtins.getattr", "__builtin__.getattr")
_COLLECTED_FROM_BYTES = 2**20


class UnknownNameError(FormatError):
    """A pickle is refused for nothing but a name that is not known, as a trainer's new class is."""


class Record:
    """Inert stand-in of an object: the dotted name of its class or function, and what it was made with.

    `args` and `kwargs`: of its construction; `called`: whether the name was called, rather than an object of
    the class made without its constructor; `by_name`: whether it is the member of an enumeration whose name
    is its argument. `state`: what would restore it, None where the pickle gives none.
    `entries` and `elements`: of one that is also a mapping or a list. Two records are equal only if they are
    the same.
    """

    __slots__ = ("args", "by_name", "called", "elements", "entries", "kwargs", "state")
    name = ""

    called: bool
    by_name: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    entries: dict[Any, Any] | None
    elements: list[Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        made = object.__new__(cls)
        made.args, made.kwargs = args, kwargs
        made.called = made.by_name = False
        made.state = made.entries = made.elements = None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.called = True

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.entries is None:
            self.entries = {}
        self.entries[key] = value

    def append(self, value: Any) -> None:
        self.extend((value,))

    def extend(self, values: Iterable[Any]) -> None:
        if self.elements is None:
            self.elements = []
        self.elements.extend(values)

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute in its state, where that is a mapping or a pair of such (for classes with slots)."""
        for state in self.state if isinstance(self.state, tuple) else (self.state,):
            if isinstance(state, dict) and attribute in state:
                return state[attribute]
        return default

    def __repr__(self) -> str:
        return f"Record({printable(self.name)})"


@final
class Named:
    """A name that a pickle may use and what stands for it: called in its place, or (without) only held."""

    __slots__ = ("_stand_in", "name")

    def __init__(self, name: str, stand_in: Callable[..., Any] | None = None) -> None:
        self.name = name
        self._stand_in = stand_in

    def __call__(self, *args: Any) -> Any:
        if self._stand_in is None:
            raise FormatError(f"{printable(self.name)} is called, which no checkpoint needs")
        return self._stand_in(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise FormatError(f"{printable(self.name)} is altered")

    def __repr__(self) -> str:
        return f"Named({printable(self.name)})"


T = TypeVar("T")


def unalterable(what: str) -> Callable[[type[T]], type[T]]:
    """A class whose objects no pickle gives another state. Goes above `dataclass`, which before Python 3.11.3
    replaces a `__setstate__` that stands in a frozen class with slots.
    """

    def refuse(self: object, state: Any) -> NoReturn:
        raise FormatError(f"{what} is altered")

    def closed(cls: type[T]) -> type[T]:
        cls.__setstate__ = refuse  # type: ignore[attr-defined]
        return cls

    return closed


class OrderedMapping(dict[Any, Any]):
    """A `collections.OrderedDict`, with the attributes it had (torch puts `_metadata` on state dicts)."""

    __slots__ = ("attributes",)
    attributes: Mapping[str, Any] | None

    def __init__(self) -> None:
        super().__init__()
        self.attributes = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else None


class DefaultMapping(dict[Any, Any]):
    """A `collections.defaultdict`; `factory` is the name of what makes its defaults."""

    __slots__ = ("factory",)
    factory: str | None

    def __init__(self, factory: Any = None) -> None:
        super().__init__()
        self.factory = getattr(factory, "name", None)


class NumpyType:
    """A `numpy.dtype` as its code, such as `f8`, and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str):
            raise FormatError("a numpy type is not named by its code")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]


def unpickle(
    data: bytes,
    where: str,
    *,
    globals: Mapping[str, Any] = MappingProxyType({}),  # noqa: A002  the pickle machine's own word
    records: Container[str] = (),
    persistent_load: Callable[[Any], Any] | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Any:
    """The value that a pickle holds. `where` starts the message of an error.

    `globals`: what stands for a dotted name beside `PLAIN`: a function, a class of ours, any value. A class
    is handed out as it is; it must be safe to make from any arguments and to give any state, and hash by
    identity. `records`: names of classes and functions that become records; beside one, `getattr` may be
    asked for a member of it, which is how Python 3.11.0 to 3.11.3 write enumerations. `persistent_load`:
    makes a value of a persistent id. `budget_bytes`: about how much memory its values may take.

    Raises FormatError for the first thing that is wrong; UnknownNameError if that is only a global that is
    not listed and, as far as is known, does nothing when called (`hostile_names`).
    """
    scanned = scan(data, where, budget_bytes)
    asked = dict.fromkeys(scanned.globals)
    known: dict[str, Any] = {}
    if any(name in records for name in asked):
        known = {name: Named(name, _member) for name in _GETATTR if name in asked}
    # what acts first, so that nothing unknown before it hides it
    for name in sorted(asked.keys() - known.keys(), key=lambda name: (not hostile_names.acts(name), name)):
        known[name] = _stand_in(name, globals, records, where)
    collecting = gc.isenabled() and len(data) > _COLLECTED_FROM_BYTES
    if collecting:  # nothing made here is garbage; looking for it doubles the time
        gc.disable()
    try:
        return _Unpickler(data, known, persistent_load, where).load()
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    except Exception as error:
        raise FormatError(
            f"{where} is not a pickle that can be read: {type(error).__name__}: {printable(str(error))}"
        ) from error
    finally:
        if collecting:
            gc.enable()


def _stand_in(name: str, globals_: Mapping[str, Any], records: Container[str], where: str) -> Any:
    if name in globals_ or name in PLAIN:
        found = globals_[name] if name in globals_ else PLAIN[name]
        plain_function = callable(found) and not isinstance(found, (type, Named))
        return Named(name, found) if plain_function else found
    if name in records:
        return type("Record", (Record,), {"__slots__": (), "name": name})
    refused = FormatError if hostile_names.acts(name) else UnknownNameError
    raise refused(
        f"{where} is a pickle that asks for {printable(name)!r}, which is not among the names that a "
        "checkpoint of this format needs; it is refused, and nothing in it was run"
    )


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        known: Mapping[str, Any],
        persistent_load: Callable[[Any], Any] | None,
        where: str,
    ) -> None:
        super().__init__(io.BytesIO(data), fix_imports=False, buffers=None)
        self._known = known
        self._persistent_load = persistent_load
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        # the scan has seen every name; one that it did not see would be a difference between it and Python
        return self._known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent_load is None:
            raise FormatError("it refers to something outside of itself (a persistent id)")
        return self._persistent_load(pid)


def _member(owner: Any, name: Any) -> Record:
    """A member of an enumeration by its name; nothing is looked up."""
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    if not (isinstance(owner, type) and issubclass(owner, Record) and plain):
        raise FormatError("builtins.getattr is asked for something else than a member of an enumeration")
    made = owner(name)
    made.by_name = True
    return made


def _set(items: Any = ()) -> set[Any]:
    # a list does not pass the scan's check of elements; tuples can be made to hash for ever
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, (str, int, float)) for i in items):
        raise FormatError("a set holds more than text and numbers")
    if any(isinstance(i, int) and i.bit_length() > 64 for i in items):
        raise FormatError("a set holds an integer too long to be believable")
    return set(items)


def _ordered(*args: Any) -> OrderedMapping:
    if args:
        raise FormatError("an OrderedDict is made in a way that Python 3 does not use")
    return OrderedMapping()


def _default(factory: Any = None, *args: Any) -> DefaultMapping:
    if args or not (factory is None or isinstance(factory, Named)):
        raise FormatError("a defaultdict is made in a way that Python does not use")
    return DefaultMapping(factory)


def _counter(items: Any = None) -> dict[Any, Any]:
    if items is not None and type(items) is not dict:
        raise FormatError("a Counter is made in a way that Python does not use")
    return items or {}


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise FormatError("a path has a part that is not text")
    text = "/".join(parts)
    return text[1:] if text.startswith("//") else text


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    # how protocol 2 writes bytes
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise FormatError("bytes are written in a way that Python does not use")
    return text.encode("latin1")


def _no_bytes(*args: Any) -> bytes:
    if args:
        raise FormatError("bytes are made in a way that Python does not use")
    return b""


def _bytearray(data: Any = b"") -> bytearray:
    if not isinstance(data, bytes):  # a number would reserve that many bytes
        raise FormatError("a bytearray is made of something else than bytes")
    return bytearray(data)


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def _numpy_scalar(kind: Any, data: Any = None) -> int | float | bool:
    """A numpy number as Python's; of the kinds that checkpoints hold."""
    if not isinstance(kind, NumpyType) or not isinstance(data, bytes) or kind.code not in _NUMPY_CODES:
        raise FormatError("a numpy number is of a kind that checkpoints do not hold")
    order = ">" if kind.order == ">" else "<"
    value: int | float | bool = struct.unpack(order + _NUMPY_CODES[kind.code], data)[0]
    return value


_NUMPY_CODES = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip


def _plain() -> dict[str, Any]:
    """Names that any checkpoint may use, by what stands for them."""
    found: dict[str, Any] = {
        "collections.OrderedDict": _ordered,
        "collections.defaultdict": _default,
        "collections.Counter": _counter,
        "_codecs.encode": _bytes,
        "numpy.dtype": NumpyType,
    }
    for module in ("builtins", "__builtin__"):
        found |= {f"{module}.set": _set, f"{module}.frozenset": _set, f"{module}.bytes": _no_bytes}
        found |= {f"{module}.bytearray": _bytearray, f"{module}.complex": _complex}
        for name in ("list", "dict", "int", "float", "str", "bool", "tuple"):
            found[f"{module}.{name}"] = None
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            found[f"{module}.{name}"] = _path
    array = type("Record", (Record,), {"__slots__": (), "name": "numpy.ndarray"})
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray.scalar"] = _numpy_scalar
        found[f"{core}.multiarray._reconstruct"] = found[f"{core}.numeric._frombuffer"] = array
    found["numpy.ndarray"] = None
    return {name: value if isinstance(value, type) else Named(name, value) for name, value in found.items()}


#: names that every format may use: plain containers, paths (as text), bytes, numpy's numbers and arrays
PLAIN: Mapping[str, Any] = MappingProxyType(_plain())
