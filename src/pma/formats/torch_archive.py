"""Archives that `torch.save` writes: what is in them, and where their tensors' bytes lie. Imports no torch.

An archive is a zip of stored members: `data.pkl`, a pickle in which each tensor refers to a storage, and
`data/KEY`, the storage's bytes. Source: `torch/serialization.py` and `torch/_utils.py` of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

from blake3 import blake3

from pma.errors import FormatError, printable
from pma.formats.folder import Folder
from pma.formats.unpickling import BUDGET_BYTES, Named, unalterable, unpickle
from pma.formats.zip_directory import Member, ZipDirectory, read_directory
from pma.types import DType

_LARGEST_PICKLE_BYTES = 64 * 2**20
_BUDGET_BYTES_A_MEMBER = 8192  # of a tensor's record with its name, shape and hooks, about
_MOST_DIMENSIONS = 64
_LARGEST_COUNT = 2**62
# how the files of torch before 1.6 begin: a pickled magic number
_OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

#: torch's names of element types
TORCH_DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "bool": DType.BOOL,
        "uint8": DType.U8,
        "int8": DType.I8,
        "uint16": DType.U16,
        "int16": DType.I16,
        "uint32": DType.U32,
        "int32": DType.I32,
        "uint64": DType.U64,
        "int64": DType.I64,
        "float16": DType.F16,
        "bfloat16": DType.BF16,
        "float32": DType.F32,
        "float64": DType.F64,
        "complex64": DType.C64,
        "float8_e4m3fn": DType.F8_E4M3,
        "float8_e5m2": DType.F8_E5M2,
        "float8_e8m0fnu": DType.F8_E8M0,
        "float8_e4m3fnuz": DType.F8_E4M3FNUZ,
        "float8_e5m2fnuz": DType.F8_E5M2FNUZ,
    }
)
#: classes of torch's typed storages
STORAGE_DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "BoolStorage": DType.BOOL,
        "ByteStorage": DType.U8,
        "CharStorage": DType.I8,
        "ShortStorage": DType.I16,
        "IntStorage": DType.I32,
        "LongStorage": DType.I64,
        "HalfStorage": DType.F16,
        "BFloat16Storage": DType.BF16,
        "FloatStorage": DType.F32,
        "DoubleStorage": DType.F64,
        "ComplexFloatStorage": DType.C64,
    }
)


@unalterable("an element type")
@dataclass(frozen=True, eq=False)
class TorchDType:
    """A `torch.dtype` in a pickle."""

    dtype: DType
    name: str


@unalterable("a tensor")
@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StoredTensor:
    """A tensor in an archive: its first element lies at `offset_bytes` of the file.

    `stride` is in elements. `storage_offset_bytes` and `storage_bytes`: the bytes of its storage, in the
    file; `storage_key`: the storage's name in the archive, the same for tensors that share memory.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: str
    offset_bytes: int
    storage_offset_bytes: int
    storage_bytes: int
    storage_key: str
    requires_grad: bool = False
    parameter: bool = False

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie row-major, one after the other."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.element_count == 0
            expected *= size
        return True


@unalterable("a storage")
@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Storage:
    dtype: DType | None
    key: str
    file: str
    member: Member


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What `torch.save` was given, with a `StoredTensor` in place of each tensor, and a digest of what says
    where they lie.
    """

    value: Any
    digest: str


def read_archive(
    folder: Folder,
    file: str,
    offset_bytes: int = 0,
    length_bytes: int | None = None,
    *,
    records: Container[str] = (),
    globals: Mapping[str, Any] = MappingProxyType({}),  # noqa: A002  as in `unpickle`
) -> Archive:
    """Read the archive at `offset_bytes` of a file (None: to its end); no tensor's bytes are read.

    `records`, `globals`: see `unpickle`. Raises FormatError, IncompleteError.
    """
    where = str(folder.path / file)
    size_bytes = folder.size_bytes(file)
    stop = size_bytes if length_bytes is None else offset_bytes + length_bytes
    if not 0 <= offset_bytes <= stop <= size_bytes:
        raise FormatError(
            f"{where}: an archive is said to lie at {offset_bytes}–{stop}, out of {size_bytes} bytes"
        )
    _check_start(folder, file, offset_bytes, stop, where)
    directory = read_directory(folder, file, offset_bytes, stop)
    root = _root(directory, where)
    _check_byte_order(folder, file, directory, root, where)
    data = _member(folder, file, directory, f"{root}/data.pkl", _LARGEST_PICKLE_BYTES, where)
    value = unpickle(
        data,
        where,
        globals={**TORCH, **globals},
        records=records,
        persistent_load=_storages(directory, root, file),
        budget_bytes=BUDGET_BYTES + _BUDGET_BYTES_A_MEMBER * len(directory.members),
    )
    return Archive(value=value, digest=blake3(data).update(directory.digest.encode()).hexdigest())


def _check_start(folder: Folder, file: str, start: int, stop: int, where: str) -> None:
    first = bytearray(min(len(_OLD_MAGIC), stop - start))
    folder.read(file, start, [memoryview(first)])
    if first[:4] == b"PK\x03\x04":
        return
    if first[:2] == _OLD_MAGIC[:2]:
        name = printable(where)
        raise FormatError(
            f"{name} is a pickle in the format of torch before 1.6, which cannot be read by position. "
            f"Convert it: python -c 'import sys, torch; f = sys.argv[1]; "
            f"torch.save(torch.load(f, weights_only=True), f)' {name}"
        )
    raise FormatError(f"{where} is no archive of torch.save; it begins with {bytes(first[:4])!r}")


def _root(directory: ZipDirectory, where: str) -> str:
    """The folder that every member of the archive is in."""
    roots = {name.split("/", 1)[0] for name in directory.members}
    if len(roots) != 1 or any("/" not in name for name in directory.members):
        raise FormatError(
            f"{where} is a zip archive, but not of torch.save: its members are not in one folder"
        )
    root = roots.pop()
    if f"{root}/constants.pkl" in directory.members:
        raise FormatError(
            f"{where} is a TorchScript program, not a checkpoint; save the model's state_dict instead"
        )
    if f"{root}/data.pkl" not in directory.members:
        raise FormatError(f"{where} is a zip archive, but not of torch.save: {root}/data.pkl is missing")
    return root


def _check_byte_order(folder: Folder, file: str, directory: ZipDirectory, root: str, where: str) -> None:
    if f"{root}/byteorder" in directory.members:  # before 2.0 torch did not write it
        order = _member(folder, file, directory, f"{root}/byteorder", 16, where)
        if order != b"little":
            raise FormatError(f"{where} was written with byte order {order!r}; only little is read")


def _member(
    folder: Folder, file: str, directory: ZipDirectory, name: str, largest_bytes: int, where: str
) -> bytes:
    member = directory.members[name]
    if member.length_bytes > largest_bytes:
        raise FormatError(
            f"{where}: {printable(name)} has {member.length_bytes} bytes; more than {largest_bytes} is not "
            "believable for it"
        )
    data = bytearray(member.length_bytes)
    folder.read(file, member.offset_bytes, [memoryview(data)])
    return bytes(data)


def _storages(directory: ZipDirectory, root: str, file: str) -> Callable[[Any], _Storage]:
    def load(pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise FormatError("a persistent id is not that of a storage")
        _, kind, key, _, count = pid
        if not isinstance(kind, StorageType) or not isinstance(key, str) or not _is_count(count):
            raise FormatError("the record of a storage is malformed")
        member = directory.members.get(f"{root}/data/{key}")
        if member is None:
            raise FormatError(f"storage {printable(key)!r} is not in the archive")
        width = kind.dtype.bits // 8 if kind.dtype else 1
        if count * width != member.length_bytes:
            raise FormatError(
                f"storage {printable(key)!r} is said to have {count} elements of {width} bytes, "
                f"but {member.length_bytes} bytes are stored"
            )
        return _Storage(dtype=kind.dtype, key=key, file=file, member=member)

    return load


@dataclass(frozen=True, eq=False)
class StorageType:
    """A storage class in a pickle; one without a type holds bytes."""

    dtype: DType | None

    def __setstate__(self, state: Any) -> NoReturn:
        raise FormatError("a storage class is altered")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def _check_as_stored(metadata: Any) -> None:
    """Torch negates or conjugates some tensors only when they are used: what is stored is not their value."""
    if metadata is not None and not (isinstance(metadata, dict) and not any(metadata.values())):
        raise FormatError(
            "a tensor is to be conjugated or negated as it is loaded, which is not done here; save it again "
            "with .resolve_conj().resolve_neg()"
        )


def _tensor_v2(
    storage: Any,
    first: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    _: Any = None,
    metadata: Any = None,
    *__: Any,
) -> StoredTensor:
    _check_as_stored(metadata)
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise FormatError("a tensor has no storage of a type that is known")
    return _tensor(storage, storage.dtype, first, size, stride, requires_grad)


def _tensor_v3(
    storage: Any,
    first: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    _: Any,
    dtype: Any,
    metadata: Any = None,
    *__: Any,
) -> StoredTensor:
    _check_as_stored(metadata)
    if not isinstance(storage, _Storage) or not isinstance(dtype, TorchDType):
        raise FormatError("a tensor has no storage of a type that is known")
    return _tensor(storage, dtype.dtype, first, size, stride, requires_grad)


def _tensor(
    storage: _Storage, dtype: DType, first: Any, size: Any, stride: Any, requires_grad: Any
) -> StoredTensor:
    """A tensor whose every element lies inside its storage."""
    dimensions = (*size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not all(_is_count(value) for value in (first, *dimensions)):
        raise FormatError("the record of a tensor has an offset, size or stride that is no count")
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise FormatError(f"a tensor has {len(size)} dimensions and {len(stride)} strides")
    last = (
        first + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size
        else first - 1
    )
    width = dtype.bits // 8
    if (last + 1) * width > storage.member.length_bytes:
        raise FormatError(
            f"a tensor of shape {size} from element {first} on does not fit storage "
            f"{printable(storage.key)!r} of {storage.member.length_bytes} bytes"
        )
    return StoredTensor(
        dtype=dtype,
        shape=tuple(size),
        stride=tuple(stride),
        file=storage.file,
        offset_bytes=storage.member.offset_bytes + first * width,
        storage_offset_bytes=storage.member.offset_bytes,
        storage_bytes=storage.member.length_bytes,
        storage_key=storage.key,
        requires_grad=requires_grad is True,
    )


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise FormatError("a parameter is made of something else than a tensor")
    return replace(data, requires_grad=requires_grad is True, parameter=True)


def _from_type(function: Any, kind: Any, arguments: Any, _: Any = None) -> StoredTensor:
    """A tensor with attributes of its own, which are dropped."""
    plain = isinstance(kind, Named) and kind.name in _PLAIN_TENSORS
    if not plain or not isinstance(function, Named) or function.name not in _REBUILD:
        raise FormatError("a tensor is of a class of its own")
    made: StoredTensor = function(*arguments)
    return made


class Size(tuple[int, ...]):
    """A `torch.Size` in a pickle."""

    __slots__ = ()


def _size(values: Any = ()) -> Size:
    if not isinstance(values, (tuple, list)) or not all(_is_count(value) for value in values):
        raise FormatError("a torch.Size holds something else than counts")
    if len(values) > _MOST_DIMENSIONS:
        raise FormatError(f"a torch.Size has {len(values)} dimensions")
    return Size(values)


def _text(value: Any = "", index: Any = None) -> str:
    """A device, layout or memory format as its name."""
    if not isinstance(value, str) or not (index is None or _is_count(index)):
        raise FormatError("a device or layout is not named by text")
    return value if index is None else f"{value}:{index}"


_REBUILD: Mapping[str, Callable[..., StoredTensor]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_PLAIN_TENSORS = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.Parameter",
    "torch.nn.parameter.Buffer",
)


def _torch_names() -> dict[str, Any]:
    """What stands for torch's own names in a checkpoint."""
    found: dict[str, Any] = dict(_REBUILD)
    found["torch._tensor._rebuild_from_type_v2"] = _from_type
    found["torch.Size"] = _size
    found["torch.device"] = found["torch.serialization._get_layout"] = _text
    for name in _PLAIN_TENSORS:
        found[name] = Named(name)
    for name in ("strided", "contiguous_format", "preserve_format", "channels_last", "channels_last_3d"):
        found[f"torch.{name}"] = Named(f"torch.{name}")
    for name, dtype in TORCH_DTYPES.items():
        found[f"torch.{name}"] = TorchDType(dtype, name)
    for alias, name in _DTYPE_ALIASES.items():
        found[f"torch.{alias}"] = found[f"torch.{name}"]
    for name, dtype in STORAGE_DTYPES.items():
        found[f"torch.{name}"] = found[f"torch.storage.{name}"] = StorageType(dtype)
    found["torch.storage.UntypedStorage"] = found["torch.UntypedStorage"] = StorageType(None)
    return found


_DTYPE_ALIASES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}

#: torch's names, by what stands for them: tensors of archives, sizes, element types, devices
TORCH: Mapping[str, Any] = MappingProxyType(_torch_names())
