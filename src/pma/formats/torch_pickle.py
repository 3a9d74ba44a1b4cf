"""Writes the pickle in a torch archive: plain values, inert records as they were, and tensors. Imports no
torch.

Protocol 2 as `torch.save` uses it, so that `torch.load(weights_only=True)` reads what is plain. Every name is
written as text; nothing it stands for is looked up.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pma.formats.torch_archive import STORAGE_DTYPES, TORCH_DTYPES, Size, TorchDType
from pma.formats.unpickling import DefaultMapping, Named, OrderedMapping, Record
from pma.types import DType, TensorSpec

_DEEPEST = 100
_MOST_BYTES = 64 * 2**20
_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ORDERED = "collections.OrderedDict"


class CannotEncode(Exception):
    """A value that would not be the same when read again; told to callers inside the formats room only."""


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor goes in a value to be written, and what torch knew of it beside type and shape.

    `repeated_to`: the shape of a tensor that has the one stored element everywhere.
    """

    spec: TensorSpec
    repeated_to: tuple[int, ...] | None = None
    requires_grad: bool = False
    parameter: bool = False


def encode(value: Any) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """The pickle of a value, and the tensors in it in the order of their storages `0`, `1`, ….

    Tensors are `TensorPlace` or `TensorSpec`. Raises CannotEncode for what would not read as it was.
    """
    encoder = _Encoder()
    encoder.put(value, 0)
    return b"\x80\x02" + b"".join(encoder.parts) + b".", tuple(encoder.tensors)


class _Encoder:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.tensors: list[TensorSpec] = []
        self._names: dict[str, int] = {}
        self._written: dict[int, int] = {}
        self._alive: list[Any] = []  # identities are those of values that exist
        self._remembered = 0
        self._bytes = 0

    def _emit(self, *parts: bytes) -> None:
        self.parts.extend(parts)
        self._bytes += sum(map(len, parts))
        if self._bytes > _MOST_BYTES:
            raise CannotEncode("it is too large")

    def put(self, value: Any, depth: int) -> None:
        """Write one value."""
        if depth > _DEEPEST:
            raise CannotEncode("values are nested too deeply")
        simple = _SIMPLE.get(type(value))
        if simple is not None:
            self._emit(simple(value))
        elif type(value) in _CONTAINERS:
            _CONTAINERS[type(value)](self, value, depth + 1)
        elif id(value) in self._written:
            self._emit(b"j" + struct.pack("<I", self._written[id(value)]))
        elif type(value) in _SHARED:
            _SHARED[type(value)](self, value, depth + 1)
        elif isinstance(value, Record):
            self._record(value, depth + 1)
        else:
            raise CannotEncode(f"a {type(value).__name__} cannot be written")

    def name(self, dotted: str) -> None:
        """A global: its name once, then a reference to it."""
        if dotted in self._names:
            self._emit(b"j" + struct.pack("<I", self._names[dotted]))
            return
        module, _, name = dotted.rpartition(".")
        if not module or "\n" in dotted:
            raise CannotEncode("a name cannot be written")
        self._emit(f"c{module}\n{name}\n".encode())
        self._names[dotted] = self._remember()

    def begun(self, value: Any) -> None:
        """What was written last is `value`, which may occur again: a reference to it is written then."""
        self._written[id(value)] = self._remember()
        self._alive.append(value)

    def _remember(self) -> int:
        self._emit(b"r" + struct.pack("<I", self._remembered))
        self._remembered += 1
        return self._remembered - 1

    def items(self, mapping: dict[Any, Any], depth: int) -> None:
        """Entries of the mapping that was written last."""
        if mapping:
            self._emit(b"(")
            for key, value in mapping.items():
                self.put(key, depth)
                self.put(value, depth)
            self._emit(b"u")

    def elements(self, values: Any, depth: int) -> None:
        """Values one after the other, behind a mark."""
        self._emit(b"(")
        for value in values:
            self.put(value, depth)

    def call(self, dotted: str, *arguments: Any, depth: int) -> None:
        """What a named function gives for some arguments."""
        self.name(dotted)
        self.elements(arguments, depth)
        self._emit(b"tR")

    def ordered(self, value: OrderedMapping, depth: int) -> None:
        self.call(_ORDERED, depth=depth)
        self.begun(value)
        self.items(value, depth)
        if value.attributes:
            self.put(value.attributes, depth)
            self._emit(b"b")

    def tensor(self, place: TensorPlace | TensorSpec, depth: int) -> None:
        if isinstance(place, TensorSpec):
            place = TensorPlace(spec=place)
        if place.parameter:
            self.name("torch._utils._rebuild_parameter")
            self._emit(b"(")
        self._plain_tensor(place, depth)
        if place.parameter:
            self.put(place.requires_grad, depth)
            self.call(_ORDERED, depth=depth)
            self._emit(b"tR")

    def _plain_tensor(self, place: TensorPlace, depth: int) -> None:
        spec = place.spec
        typed = _STORAGES.get(spec.dtype)
        if spec.dtype not in _DTYPE_NAMES:
            raise CannotEncode(f"torch has no element type {spec.dtype.name}")
        self.name(f"torch._utils._rebuild_tensor_v{2 if typed else 3}")
        self._emit(b"((")
        self.put("storage", depth)
        self.name(f"torch.{typed}" if typed else "torch.storage.UntypedStorage")
        self.put(str(len(self.tensors)), depth)
        self.put("cpu", depth)
        self.put(spec.element_count if typed else spec.length_bytes, depth)
        self._emit(b"tQ")
        self.put(0, depth)
        repeated = place.repeated_to
        shape, strides = spec.shape, _row_major(spec.shape)
        for counts in (shape, strides) if repeated is None else (repeated, (0,) * len(repeated)):
            self.elements(counts, depth)
            self._emit(b"t")
        self.put(place.requires_grad and not place.parameter, depth)
        self.call(_ORDERED, depth=depth)
        if not typed:
            self.name(f"torch.{_DTYPE_NAMES[spec.dtype]}")
        self._emit(b"tR")
        self.tensors.append(spec)

    def _record(self, record: Record, depth: int) -> None:
        if record.kwargs or record.name == "numpy.ndarray":
            raise CannotEncode("an object made with named arguments cannot be written in protocol 2")
        if record.by_name:
            self.name("__builtin__.getattr")
            self._emit(b"(")
            self.name(record.name)
            self.put(record.args[0], depth)
            self._emit(b"tR")
        else:
            self.name(record.name)
            self.elements(record.args, depth)
            self._emit(b"tR" if record.called else b"t\x81")
        self.begun(record)
        if record.elements:
            self.elements(record.elements, depth)
            self._emit(b"e")
        self.items(record.entries or {}, depth)
        if record.state is not None:
            self.put(record.state, depth)
            self._emit(b"b")


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def _integer(value: int) -> bytes:
    if 0 <= value < 2**8:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise CannotEncode("an integer is too long")
    return b"\x8a" + bytes([len(data)]) + data


def _string(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


_SIMPLE: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _integer,
    float: lambda value: b"G" + struct.pack(">d", value),
    str: _string,
}


def _tuple(encoder: _Encoder, value: tuple[Any, ...], depth: int) -> None:
    encoder.elements(value, depth)
    encoder._emit(b"t")
    if value:
        encoder.begun(value)


def _list(encoder: _Encoder, value: list[Any], depth: int) -> None:
    encoder._emit(b"]")
    encoder.begun(value)
    encoder.elements(value, depth)
    encoder._emit(b"e")


def _dict(encoder: _Encoder, value: dict[Any, Any], depth: int) -> None:
    encoder._emit(b"}")
    encoder.begun(value)
    encoder.items(value, depth)


def _default(encoder: _Encoder, value: DefaultMapping, depth: int) -> None:
    factory = [Named(value.factory)] if value.factory else []
    encoder.call("collections.defaultdict", *factory, depth=depth)
    encoder.begun(value)
    encoder.items(value, depth)


# what may occur several times in a value, or in itself
_SHARED: dict[type, Callable[[_Encoder, Any, int], None]] = {
    tuple: _tuple,
    list: _list,
    dict: _dict,
    OrderedMapping: _Encoder.ordered,
    DefaultMapping: _default,
}
_CONTAINERS: dict[type, Callable[[_Encoder, Any, int], None]] = {
    TensorPlace: _Encoder.tensor,
    TensorSpec: _Encoder.tensor,
    Size: lambda encoder, value, depth: encoder.call("torch.Size", tuple(value), depth=depth),
    Named: lambda encoder, value, _: encoder.name(value.name),
    TorchDType: lambda encoder, value, _: encoder.name(f"torch.{value.name}"),
    # in the way of protocol 2, which torch.load(weights_only=True) takes
    bytes: lambda encoder, value, depth: encoder.call(
        "_codecs.encode", value.decode("latin1"), "latin1", depth=depth
    ),
    set: lambda encoder, value, depth: encoder.call("__builtin__.set", sorted(value, key=repr), depth=depth),
}


def dtype_name(dtype: DType) -> str:
    """Torch's name of an element type."""
    return _DTYPE_NAMES[dtype]
