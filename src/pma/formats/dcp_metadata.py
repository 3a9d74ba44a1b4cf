"""What a distributed checkpoint's `.metadata` says, read without running it: where every chunk of every tensor
is stored.

torch pickles a `Metadata` there. Only the classes that torch puts in are known to the unpickler, and each becomes
a stand-in of ours; anything else in the file is an error. Writing is `dcp_encoding`'s part.

Source: torch 2.13, `torch/distributed/checkpoint/{metadata,filesystem,planner}.py`.
"""

# C chunks of a tensor, D dimensions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    files: tuple[str, ...]
    tensors: Mapping[str, ChunkedTensor]
    entries: Mapping[str, ByteEntry]
    paths: Mapping[str, tuple[str | int, ...]]


class _StandIn:
    """What the unpickler makes of an object of torch's: its attributes, whatever they are."""

    __slots__ = ("state",)
    state: Any

    def __init__(self, *_: object) -> None:
        self.state = None

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


def parse(data: bytes, where: str, stored_bytes: int) -> Metadata:
    """Read a `.metadata`; `where` begins the message of an error. `stored_bytes`: size of the checkpoint's files.

    Raises FormatError for anything that torch would not have written.
    """
    # an item of a checkpoint has at least a kilobyte, so more names than its files have room for are a trick
    budget_bytes = BUDGET_BYTES + min(2 * stored_bytes, _LARGEST_BUDGET_BYTES)
    root = unpickle(data, where, globals=_KNOWN, budget_bytes=budget_bytes)
    fields = _fields(root, _Metadata, where)
    specs, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(specs, dict) or not isinstance(stored, dict):
        raise FormatError(f"{where}: expected names and where they are stored, found neither")
    places = _Places(where)
    for index, place in stored.items():
        places.add(index, place)
    tensors: dict[str, ChunkedTensor] = {}
    entries: dict[str, ByteEntry] = {}
    for name, spec in specs.items():
        if not isinstance(name, str):
            raise FormatError(f"{where}: a tensor's name is a {type(name).__name__}")
        if isinstance(spec, _Tensor):
            tensors[name] = _tensor(name, spec, places, where)
        elif isinstance(spec, _Bytes):
            file, offset, length = places.find(name, None)
            entries[name] = ByteEntry(file=file, offset_bytes=offset, length_bytes=length)
        else:
            raise FormatError(f"{where}: {printable(name)} is neither a tensor nor bytes")
    paths = _paths(fields.get("planner_data"))
    return Metadata(files=tuple(places.files), tensors=tensors, entries=entries, paths=paths)


class _Places:
    """Where items are stored, by name and first element."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.files: dict[str, int] = {}
        self._found: dict[tuple[str, tuple[int, ...] | None], tuple[int, int, int]] = {}

    def add(self, index: object, place: object) -> None:
        """Take over one entry of `storage_data`."""
        key = _fields(index, _Index, self._where)
        name, start = key.get("fqn"), key.get("offset")
        item = _fields(place, _Storage, self._where)
        file, offset, length = item.get("relative_path"), item.get("offset"), item.get("length")
        if type(name) is not str or type(file) is not str or not _is_count(offset) or not _is_count(length):
            raise FormatError(f"{self._where}: an item's name or place is missing or not believable")
        if item.get("transform_descriptors"):
            raise FormatError(
                f"{self._where}: {printable(name)} is stored compressed or otherwise transformed; "
                "save the checkpoint without extensions"
            )
        number = self.files.get(file)
        if number is None:
            number = self.files[_plain_name(file, self._where)] = len(self.files)
        at = None if start is None else _size(start, name, self._where)
        if (name, at) in self._found:
            raise FormatError(f"{self._where}: {printable(name)} at {at} is stored twice")
        self._found[name, at] = (number, offset, length)

    def find(self, name: str, start: tuple[int, ...] | None) -> tuple[int, int, int]:
        """(file, offset, length) of an item."""
        place = self._found.get((name, start))
        if place is None:
            at = "" if start is None else f" at {start}"
            raise FormatError(f"{self._where}: {printable(name)}{at} is not stored anywhere")
        return place


def _tensor(name: str, spec: _Tensor, places: _Places, where: str) -> ChunkedTensor:
    fields = _fields(spec, _Tensor, where)
    shape = _size(fields.get("size"), name, where)
    dtype = _dtype(fields.get("properties"), name, where)
    listed = fields.get("chunks")
    if not isinstance(listed, list) or not listed:
        raise FormatError(f"{where}: {printable(name)} has no chunks")
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for chunk in listed:
        box = _fields(chunk, _Chunk, where)
        starts, sizes = _size(box.get("offsets"), name, where), _size(box.get("sizes"), name, where)
        if len(starts) != len(shape) or len(sizes) != len(shape):
            raise FormatError(f"{where}: {printable(name)}: a chunk has another number of dimensions")
        # ranks that hold nothing of a small tensor save an empty chunk
        if 0 not in sizes or 0 in shape:
            rows.append((starts, sizes))
    if 0 in shape:
        rows = rows[:1]
    # without rows the tensor is not covered, which the check below finds
    starts_CD = np.array([starts for starts, _ in rows], np.int64).reshape(len(rows), len(shape))
    sizes_CD = np.array([sizes for _, sizes in rows], np.int64).reshape(len(rows), len(shape))
    check_cover(shape, starts_CD, sizes_CD, f"{where}: {printable(name)}")
    found = np.array([places.find(name, starts) for starts, _ in rows], np.int64).reshape(len(rows), 3)
    return ChunkedTensor(
        dtype=dtype,
        shape=shape,
        starts_CD=starts_CD,
        sizes_CD=sizes_CD,
        file_C=found[:, 0],
        offset_C=found[:, 1],
        length_C=found[:, 2],
    )


def _fields(value: object, expected: type[_StandIn], where: str) -> dict[str, Any]:
    state = getattr(value, "state", None) if type(value) is expected else None
    if not isinstance(state, dict):
        raise FormatError(f"{where}: expected a {expected.__name__[1:]}, found a {type(value).__name__}")
    return state


def _size(value: object, name: str, where: str) -> tuple[int, ...]:
    believable = isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS
    if not believable or not all(map(_is_count, value)):  # type: ignore[arg-type]
        raise FormatError(f"{where}: {printable(name)} has a size or place that is not believable")
    return value  # type: ignore[return-value]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


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
        f"{metadata}._MEM_FORMAT_ENCODING": _Unread,
        f"{_CHECKPOINT}.filesystem._StorageInfo": _Storage,
        "torch.serialization._get_layout": _Unread,
        "torch.Size": tuple,
    }
    for name in _DTYPES:
        known[name] = Named(name)
    # Megatron keeps every rank's plan beside, and its own data
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"):
        known[f"{planner}.{name}"] = _Unread
    known[f"{_CHECKPOINT}.filesystem._StoragePrefix"] = _Unread
    for name in ("MCoreSavePlan", "MCoreMetadata"):
        known[f"megatron.core.dist_checkpointing.strategies.torch.{name}"] = _Unread
    return known


_DTYPES = {f"torch.{name}": dtype for name, dtype in TORCH_DTYPES.items()}
_KNOWN = _known()
