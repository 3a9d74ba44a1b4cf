"""Writes a `.metadata` that torch.distributed.checkpoint reads, byte by byte: torch itself is never imported.

The pickle names torch's classes and gives each its attributes, as torch 2.13 does (protocol 4). What occurs
often is remembered and referred to, so that 400,000 chunks stay below 50 MB.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pickle import (
    APPEND,
    BINGET,
    BINUNICODE,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    LONG_BINGET,
    MARK,
    MEMOIZE,
    NEWFALSE,
    NEWOBJ,
    NONE,
    PROTO,
    REDUCE,
    SETITEM,
    STACK_GLOBAL,
    STOP,
    TUPLE,
    TUPLE1,
)

from pma.formats.dcp_metadata import ChunkedTensor, Metadata
from pma.formats.torch_archive import TORCH_DTYPES
from pma.types import DType

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
#: the version of the layout that torch 2.13 writes
_VERSION = "1.0.0"


def can_hold(dtype: DType) -> bool:
    """Whether torch has this element type."""
    return dtype in _NAMES


def encode(metadata: Metadata) -> bytes:
    """The `.metadata` of a checkpoint."""
    out = _Pickle()
    out.begin(_METADATA, "Metadata")
    out.text("state_dict_metadata")
    out.raw(EMPTY_DICT)
    for name, tensor in metadata.tensors.items():
        out.text(name)
        _tensor(out, tensor)
        out.raw(SETITEM)
    for name in metadata.entries:
        out.text(name)
        out.name(_METADATA, "BytesStorageMetadata")
        out.raw(EMPTY_TUPLE + NEWOBJ + SETITEM)
    out.raw(SETITEM)
    out.text("planner_data")
    _paths(out, metadata.paths)
    out.raw(SETITEM)
    out.text("storage_data")
    out.raw(EMPTY_DICT)
    for name, tensor in metadata.tensors.items():
        _places(out, name, tensor, metadata.files)
    for name, entry in metadata.entries.items():
        _index(out, name, None, None)
        _place(out, metadata.files[entry.file], entry.offset_bytes, entry.length_bytes)
        out.raw(SETITEM)
    out.raw(SETITEM)
    out.text("storage_meta")
    out.begin(_METADATA, "StorageMeta")
    for name in ("checkpoint_id", "save_id", "load_id"):
        out.text(name)
        out.raw(NONE + SETITEM)
    out.text("modules")
    out.raw(EMPTY_LIST + SETITEM + BUILD + SETITEM)
    out.text("version")
    out.text(_VERSION)
    out.raw(SETITEM + BUILD + STOP)
    return out.finished()


def _tensor(out: _Pickle, tensor: ChunkedTensor) -> None:
    out.begin(_METADATA, "TensorStorageMetadata")
    out.text("properties")
    out.name(_METADATA, "TensorProperties")
    out.raw(EMPTY_TUPLE + NEWOBJ + MARK)
    out.name("torch", _NAMES[tensor.dtype])
    out.name("torch.serialization", "_get_layout")
    out.text("torch.strided")
    out.raw(TUPLE1 + REDUCE + NEWFALSE)
    out.name(_METADATA, "_MEM_FORMAT_ENCODING")
    out.number(0)
    out.raw(TUPLE1 + REDUCE + NEWFALSE + TUPLE + BUILD + SETITEM)
    out.text("size")
    out.size(tensor.shape)
    out.raw(SETITEM)
    out.text("chunks")
    out.raw(EMPTY_LIST)
    for starts, sizes in zip(tensor.starts_CD.tolist(), tensor.sizes_CD.tolist(), strict=True):
        out.begin(_METADATA, "ChunkStorageMetadata")
        out.text("offsets")
        out.size(starts)
        out.raw(SETITEM)
        out.text("sizes")
        out.size(sizes)
        out.raw(SETITEM + BUILD + APPEND)
    out.raw(SETITEM + BUILD)


def _places(out: _Pickle, name: str, tensor: ChunkedTensor, files: tuple[str, ...]) -> None:
    columns = (tensor.starts_CD, tensor.file_C, tensor.offset_C, tensor.length_C)
    for number, (starts, file, offset, length) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        _index(out, name, starts, number)
        _place(out, files[file], offset, length)
        out.raw(SETITEM)


def _index(out: _Pickle, name: str, starts: list[int] | None, number: int | None) -> None:
    out.begin(_METADATA, "MetadataIndex")
    out.text("fqn")
    out.text(name)
    out.raw(SETITEM)
    out.text("index")
    out.raw(NONE) if number is None else out.number(number)
    out.raw(SETITEM)
    if starts is not None:
        out.text("offset")
        out.size(starts)
        out.raw(SETITEM)
    out.raw(BUILD)


def _place(out: _Pickle, file: str, offset_bytes: int, length_bytes: int) -> None:
    out.begin(_FILESYSTEM, "_StorageInfo")
    out.text("relative_path")
    out.text(file)
    out.raw(SETITEM)
    out.text("offset")
    out.number(offset_bytes)
    out.raw(SETITEM)
    out.text("length")
    out.number(length_bytes)
    out.raw(SETITEM + BUILD)


def _paths(out: _Pickle, paths: Mapping[str, tuple[str | int, ...]]) -> None:
    out.raw(EMPTY_DICT)
    for name, path in paths.items():
        out.text(name)
        out.raw(MARK)
        for key in path:
            out.text(key) if isinstance(key, str) else out.number(key)
        out.raw(TUPLE + SETITEM)


class _Pickle:
    """A pickle in the making."""

    def __init__(self) -> None:
        self._parts = [PROTO + b"\x04"]
        self._memo: dict[Hashable, bytes] = {}

    def finished(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)

    def raw(self, opcodes: bytes) -> None:
        """Opcodes without an argument."""
        self._parts.append(opcodes)

    def text(self, value: str) -> None:
        """A string; the second time a reference to the first."""
        if not self._known(value):
            data = value.encode("utf-8", "surrogatepass")
            self._parts.append(BINUNICODE + len(data).to_bytes(4, "little") + data)
            self._remember(value)

    def number(self, value: int) -> None:
        """A natural number."""
        if value < 2**31:
            self._parts.append(b"J" + value.to_bytes(4, "little"))
        else:
            data = value.to_bytes((value.bit_length() + 8) // 8, "little")
            self._parts.append(b"\x8a" + len(data).to_bytes(1, "little") + data)

    def size(self, value: tuple[int, ...] | list[int]) -> None:
        """A torch.Size."""
        key = ("torch.Size", *value)
        if not self._known(key):
            self.name("torch", "Size")
            self.raw(MARK)
            for item in value:
                self.number(item)
            self.raw(TUPLE + TUPLE1 + REDUCE)
            self._remember(key)

    def name(self, module: str, name: str) -> None:
        """A class or function of a module."""
        key = (module, name)
        if not self._known(key):
            self.text(module)
            self.text(name)
            self.raw(STACK_GLOBAL)
            self._remember(key)

    def begin(self, module: str, name: str) -> None:
        """A new object and the dictionary of its attributes; BUILD ends it."""
        self.name(module, name)
        self.raw(EMPTY_TUPLE + NEWOBJ + EMPTY_DICT)

    def _known(self, key: Hashable) -> bool:
        reference = self._memo.get(key)
        if reference is not None:
            self._parts.append(reference)
        return reference is not None

    def _remember(self, key: Hashable) -> None:
        number = len(self._memo)
        short = number < 256
        code = BINGET if short else LONG_BINGET
        self._memo[key] = code + number.to_bytes(1 if short else 4, "little")
        self._parts.append(MEMOIZE)
