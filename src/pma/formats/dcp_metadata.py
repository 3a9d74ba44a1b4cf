"""What a distributed checkpoint's `.metadata` says, read without running it: where every chunk of every
tensor is stored.

torch pickles a `Metadata` there. Only the classes that torch puts in are known to the unpickler, and each
becomes a stand-in of ours; anything else in the file is an error. Writing is `dcp_encoding`'s part.

Source: torch 2.13, `torch/distributed/checkpoint/{metadata,filesystem,planner}.py`.
"""

# C chunks of a tensor, D dimensions

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.errors import FormatError, printable
from pma.formats.dcp_boxes import check_cover
from pma.formats.torch_archive import TORCH_DTYPES
from pma.formats.unpickling import BUDGET_BYTES, Named, unpickle
from pma.types import DType

METADATA_FILE = ".metadata"
LARGEST_METADATA_BYTES = 512 * 2**20
_LARGEST_BUDGET_BYTES = 4 * 2**30
_MOST_DIMENSIONS = 16
_CHECKPOINT = "torch.distributed.checkpoint"

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkedTensor:
    """A tensor in chunks: where each begins in the tensor, its size, and the stored item that holds it.

    `starts_CD`, `sizes_CD`: elements. `file_C`: number of its file. `offset_C`, `length_C`: the item's bytes
    there. No chunk is empty unless the tensor is; in that case there is one.
    """

    dtype: DType
    shape: tuple[int, ...]
    starts_CD: Integers
    sizes_CD: Integers
    file_C: Integers
    offset_C: Integers
    length_C: Integers


@dataclass(frozen=True, kw_only=True)
class ByteEntry:
    """Something that is no tensor, as bytes that nobody opens: number of its file, offset, length."""

    file: int
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of a `.metadata`.

    `paths`: for every name of a nested state dict the keys that lead to it; empty where there was no nesting.
    `items`: number of the file, offset and length of everything stored, also of what holds no element.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, ChunkedTensor]
    entries: Mapping[str, ByteEntry]
    paths: Mapping[str, tuple[str | int, ...]]
    items: Integers


class _StandIn:
    """What the unpickler makes of an object of torch's: its attributes, whatever they are."""

    __slots__ = ("state",)
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_StandIn):
    __slots__ = ()


class _Tensor(_StandIn):
    __slots__ = ()


class _Bytes(_StandIn):
    __slots__ = ()


class _Chunk(_StandIn):
    __slots__ = ()


class _Properties(_StandIn):
    __slots__ = ()


class _Index(_StandIn):
    __slots__ = ()


class _Storage(_StandIn):
    __slots__ = ()


class _Unread(_StandIn):
    """Something that says nothing about where bytes lie."""

    __slots__ = ()

    def __new__(cls, *_: object) -> _Unread:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        """Its arguments do not matter."""


def parse(data: bytes, where: str, stored_bytes: int) -> Metadata:
    """Read a `.metadata`; `where` begins the message of an error. `stored_bytes`: size of the checkpoint's
    files.

    Raises FormatError for anything that torch would not have written.
    """
    collecting = gc.isenabled()
    gc.disable()  # nothing made here is garbage; looking for it among millions of objects doubles the time
    try:
        return _parse(data, where, stored_bytes)
    finally:
        if collecting:
            gc.enable()


def _parse(data: bytes, where: str, stored_bytes: int) -> Metadata:
    # an item of a checkpoint has at least a kilobyte, so more names than its files have room for are a trick
    budget_bytes = BUDGET_BYTES + min(4 * stored_bytes, _LARGEST_BUDGET_BYTES)
    root = unpickle(data, where, globals=_KNOWN, records=_ENUMERATIONS, budget_bytes=budget_bytes)
    fields = _fields(root, _Metadata, where)
    specs, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(specs) is not dict or type(stored) is not dict:
        raise FormatError(f"{where}: expected names and where they are stored, found neither")
    places = _Places(stored, where)
    tensors: dict[str, ChunkedTensor] = {}
    entries: dict[str, ByteEntry] = {}
    for name, spec in specs.items():
        if type(name) is not str:
            raise FormatError(f"{where}: a tensor's name is a {type(name).__name__}")
        if type(spec) is _Tensor:
            tensors[name] = _tensor(name, spec, places, where)
        elif type(spec) is _Bytes:
            file, offset, length = places.entry(name)
            entries[name] = ByteEntry(file=file, offset_bytes=offset, length_bytes=length)
        else:
            raise FormatError(f"{where}: {printable(name)} is neither a tensor nor bytes")
    paths = _paths(fields.get("planner_data"))
    return Metadata(files=places.files, tensors=tensors, entries=entries, paths=paths, items=places.rows)


class _Places:
    """Where items are stored, by name and first element."""

    def __init__(self, stored: Mapping[Any, Any], where: str) -> None:
        self._where = where
        self._items: dict[str, list[int]] = {}
        self._starts: list[Any] = []
        numbers: dict[str, int] = {}
        rows: list[tuple[int, Any, Any]] = []
        for index, place in stored.items():
            key, item = _fields(index, _Index, where), _fields(place, _Storage, where)
            name, file = key.get("fqn"), item.get("relative_path")
            if type(name) is not str or type(file) is not str:
                raise FormatError(f"{where}: an item has no name or no file")
            if item.get("transform_descriptors"):
                raise FormatError(
                    f"{where}: {printable(name)} is stored compressed or otherwise transformed; "
                    "save the checkpoint without extensions"
                )
            if file not in numbers:
                numbers[_plain_name(file, where)] = len(numbers)
            self._items.setdefault(name, []).append(len(rows))
            self._starts.append(key.get("offset"))
            rows.append((numbers[file], item.get("offset"), item.get("length")))
        self.files = tuple(numbers)
        self.rows = _counts(rows, 3, f"{where}: the place of an item")

    def entry(self, name: str) -> tuple[int, int, int]:
        """File, offset and length of an entry of bytes."""
        items = self._items.get(name, [])
        if len(items) != 1 or self._starts[items[0]] is not None:
            raise FormatError(f"{self._where}: {printable(name)} is not stored, or more than once")
        file, offset, length = self.rows[items[0]].tolist()
        return file, offset, length

    def chunks(self, name: str, shape: tuple[int, ...], starts_CD: Integers) -> Integers:
        """File, offset and length of the chunks of a tensor that begin at `starts_CD`."""
        where = f"{self._where}: {printable(name)}"
        items = self._items.get(name, [])
        stored = _counts([self._starts[item] for item in items], len(shape), f"{where}: the place of a chunk")
        # a number for each place in the tensor, or one past its end, where chunks of no element begin
        steps = np.array(
            [math.prod(size + 1 for size in shape[axis + 1 :]) for axis in range(len(shape))], np.int64
        )
        if (stored > np.array(shape, np.int64)).any():
            raise FormatError(f"{where}: a chunk is stored that begins outside the shape {shape}")
        stored_S, wanted_C = stored @ steps, starts_CD @ steps
        order = np.argsort(stored_S)
        stored_S = stored_S[order]
        if (stored_S[1:] == stored_S[:-1]).any():
            raise FormatError(f"{where}: a chunk is stored twice")
        at_C = np.searchsorted(stored_S, wanted_C)
        if not len(stored_S) or (stored_S[np.minimum(at_C, len(stored_S) - 1)] != wanted_C).any():
            raise FormatError(f"{where}: a chunk is not stored anywhere")
        return self.rows[np.array(items, np.int64)[order[at_C]]]


def _tensor(name: str, spec: _Tensor, places: _Places, where: str) -> ChunkedTensor:
    fields = _fields(spec, _Tensor, where)
    there = f"{where}: {printable(name)}"
    size, listed = fields.get("size"), fields.get("chunks")
    if type(size) is not tuple or len(size) > _MOST_DIMENSIONS or type(listed) is not list or not listed:
        raise FormatError(f"{there} has no size or no chunks")
    shape = tuple(_counts([size], len(size), f"{there}: the size")[0].tolist())
    if math.prod(size + 1 for size in shape) >= 2**62:
        raise FormatError(f"{there}: the size {shape} is not believable")
    boxes = [_fields(chunk, _Chunk, where) for chunk in listed]
    starts_CD = _counts([box.get("offsets") for box in boxes], len(shape), f"{there}: a chunk's place")
    sizes_CD = _counts([box.get("sizes") for box in boxes], len(shape), f"{there}: a chunk's size")
    if 0 in shape:
        starts_CD, sizes_CD = starts_CD[:1], sizes_CD[:1]
    else:  # ranks that hold nothing of a small tensor save an empty chunk
        held_C = (sizes_CD > 0).all(axis=1)
        starts_CD, sizes_CD = starts_CD[held_C], sizes_CD[held_C]
    check_cover(shape, starts_CD, sizes_CD, there)
    found = places.chunks(name, shape, starts_CD)
    return ChunkedTensor(
        dtype=_dtype(fields.get("properties"), name, where),
        shape=shape,
        starts_CD=starts_CD,
        sizes_CD=sizes_CD,
        file_C=found[:, 0],
        offset_C=found[:, 1],
        length_C=found[:, 2],
    )


def _fields(value: object, expected: type[_StandIn], where: str) -> dict[str, Any]:
    state = getattr(value, "state", None) if type(value) is expected else None
    if type(state) is dict:
        return state
    raise FormatError(
        f"{where}: expected a {expected.__name__[1:]}, found a {type(value).__name__.lstrip('_')}"
    )


def _counts(rows: Sequence[Any], columns: int, what: str) -> Integers:
    """Rows of natural numbers as an array; `what` begins the message of an error."""
    try:
        # type() and not isinstance(): a truth value is an int to Python
        if set(map(len, rows)) <= {columns} and set(map(type, chain.from_iterable(rows))) <= {int}:
            array = np.array(rows, np.int64).reshape(len(rows), columns)
            if ((array >= 0) & (array < 2**62)).all():
                return array
    except (TypeError, OverflowError):
        pass
    raise FormatError(f"{what} is not believable")


def _dtype(properties: object, name: str, where: str) -> DType:
    state = getattr(properties, "state", None) if type(properties) is _Properties else None
    named = state[0] if isinstance(state, tuple) and state else None
    found = _DTYPES.get(named.name) if isinstance(named, Named) else None
    if found is None:
        raise FormatError(f"{where}: {printable(name)} has an element type that pma does not know: {named}")
    return found


def _plain_name(file: str, where: str) -> str:
    # a name such as ../../etc/passwd or one with a separator must not lead out of the folder
    if not file.isprintable() or not file or file in (".", "..") or "/" in file or "\\" in file:
        raise FormatError(f"{where}: {printable(file)!r} is not a plain name of a file")
    return file


def _paths(planned: object) -> dict[str, tuple[str | int, ...]]:
    """How torch flattened a nested state dict; nothing where it was flat."""
    if not isinstance(planned, dict):
        return {}
    return {
        name: path
        for name, path in planned.items()
        if isinstance(name, str) and isinstance(path, tuple) and all(type(k) in (str, int) for k in path)
    }


def _known() -> dict[str, object]:
    """Every name that a `.metadata` may hold. Nothing else is looked up, and none of these is torch's own."""
    metadata, planner = f"{_CHECKPOINT}.metadata", f"{_CHECKPOINT}.planner"
    known: dict[str, object] = {
        f"{metadata}.Metadata": _Metadata,
        f"{metadata}.TensorStorageMetadata": _Tensor,
        f"{metadata}.BytesStorageMetadata": _Bytes,
        f"{metadata}.ChunkStorageMetadata": _Chunk,
        f"{metadata}.TensorProperties": _Properties,
        f"{metadata}.MetadataIndex": _Index,
        f"{metadata}.StorageMeta": _Unread,
        f"{_CHECKPOINT}.filesystem._StorageInfo": _Storage,
        "olmo_core.distributed.checkpoint.filesystem._StorageInfo": _Storage,
        "torch.serialization._get_layout": _Unread,
        "torch.Size": tuple,
    }
    for name in _DTYPES:
        known[name] = Named(name)
    # Megatron keeps every rank's plan beside, and its own data
    for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"):
        known[f"{planner}.{name}"] = _Unread
    known[f"{_CHECKPOINT}.filesystem._StoragePrefix"] = _Unread
    for name in ("MCoreSavePlan", "MCoreMetadata"):
        known[f"megatron.core.dist_checkpointing.strategies.torch.{name}"] = _Unread
    return known


_DTYPES = {f"torch.{name}": dtype for name, dtype in TORCH_DTYPES.items()}
_KNOWN = _known()
_ENUMERATIONS = (f"{_CHECKPOINT}.metadata._MEM_FORMAT_ENCODING", f"{_CHECKPOINT}.planner.WriteItemType")
