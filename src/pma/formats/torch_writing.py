"""Plans archives that `torch.load` reads: a zip of stored members, each storage at a multiple of 64 bytes.

The checksums of storages are 0, as `torch.serialization.set_crc32_options(False)` writes them: they would
have to stand in the directory before the data is known. Source: files of torch 2.13; PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from pma.formats.torch_pickle import encode
from pma.types import DType, Fragment, OutputFile, TensorSpec

_ALIGNMENT = 64
_ROOT = "archive"
_WIDE = 0xFFFFFFFF
_UTF8 = 0x800
_WIDE_EXTRA = 1
_VERSION_WIDE = 45  # the version of the zip format that has sizes of 64 bits
_PADDING = b"FB"  # the extra field that torch aligns members with


@dataclass(frozen=True, kw_only=True)
class _Member:
    name: str
    length_bytes: int
    content: bytes | None  # None: a tensor's
    tensor: TensorSpec | None = None


def archive_layout(file: str, value: Any) -> OutputFile:
    """The archive that holds `value`, in which tensors are `TensorPlace` or `TensorSpec`.

    Raises CannotEncode for values that would not read as they are.
    """
    pickled, tensors = encode(value)
    members = [_known("data.pkl", pickled), _known(".format_version", b"1")]
    members += [_known(".storage_alignment", b"64"), _known("byteorder", b"little")]
    for number, spec in enumerate(tensors):
        name = f"{_ROOT}/data/{number}"
        members.append(_Member(name=name, length_bytes=spec.length_bytes, content=None, tensor=spec))
    members.append(_known("version", b"3\n"))
    constants: list[tuple[int, bytes]] = []
    fragments: list[Fragment] = []
    directory: list[bytes] = []
    at = 0
    for member in members:
        header = _local_header(member, at)
        directory.append(_directory_entry(member, at))
        begins = at + len(header)
        constants.append((at, header + (member.content or b"")))
        if member.tensor is not None:
            fragments.append(_fragment(file, member.tensor, begins))
        at = begins + member.length_bytes
    constants.append((at, b"".join(directory) + _end(at, sum(map(len, directory)), len(members))))
    size_bytes = at + len(constants[-1][1])
    return OutputFile(
        name=file, size_bytes=size_bytes, constants=tuple(_joined(constants)), fragments=tuple(fragments)
    )


def single_tensor_archive(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, int, bytes]:
    """The archive of one tensor: the bytes before its data, the data's length, the bytes behind."""
    layout = archive_layout("", TensorSpec(name="", dtype=dtype, shape=shape))
    begins, length = layout.fragments[0].offset_bytes, layout.fragments[0].length_bytes
    if not length:
        whole = b"".join(data for _, data in layout.constants)
        return whole[:begins], 0, whole[begins:]
    (_, before), (_, behind) = layout.constants
    return before, length, behind


def _known(name: str, content: bytes) -> _Member:
    return _Member(name=f"{_ROOT}/{name}", length_bytes=len(content), content=content)


def _fragment(file: str, spec: TensorSpec, offset_bytes: int) -> Fragment:
    return Fragment(
        tensor=spec.name,
        file=file,
        offset_bytes=offset_bytes,
        length_bytes=spec.length_bytes,
        flat_start=0,
    )


def _joined(constants: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Constants with those that touch put together."""
    groups: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, data in constants:
        if offset != end:
            groups.append((offset, []))
        groups[-1][1].append(data)
        end = offset + len(data)
    return [(offset, b"".join(parts)) for offset, parts in groups]


def _checksum(member: _Member) -> int:
    return zlib.crc32(member.content) if member.content is not None else 0


def _local_header(member: _Member, at: int) -> bytes:
    """What stands before a member's bytes, which it brings to a multiple of 64 bytes."""
    name, length = member.name.encode(), member.length_bytes
    wide = length >= _WIDE
    extra = struct.pack("<HHQQ", _WIDE_EXTRA, 16, length, length) if wide else b""
    unpadded = at + 30 + len(name) + len(extra) + 4
    padding = -unpadded % _ALIGNMENT
    extra += _PADDING + struct.pack("<H", padding) + b"Z" * padding
    return (
        struct.pack(
            "<4s5H3I2H",
            b"PK\x03\x04",
            _VERSION_WIDE if wide else 0,
            _UTF8,
            0,
            0,
            0,
            _checksum(member),
            min(length, _WIDE),
            min(length, _WIDE),
            len(name),
            len(extra),
        )
        + name
        + extra
    )


def _directory_entry(member: _Member, at: int) -> bytes:
    name, length = member.name.encode(), member.length_bytes
    wide = [value for value in (length, length, at) if value >= _WIDE]
    extra = struct.pack(f"<HH{len(wide)}Q", _WIDE_EXTRA, 8 * len(wide), *wide) if wide else b""
    version = _VERSION_WIDE if wide else 0
    return (
        struct.pack(
            "<4s6H3I5H2I",
            b"PK\x01\x02",
            version,
            version,
            _UTF8,
            0,
            0,
            0,
            _checksum(member),
            min(length, _WIDE),
            min(length, _WIDE),
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            min(at, _WIDE),
        )
        + name
        + extra
    )


def _end(directory_at: int, length_bytes: int, count: int) -> bytes:
    """The end of the archive, in 64 bits as torch always writes it, and in 32."""
    wide = struct.pack(
        "<4sQ2H2I4Q",
        b"PK\x06\x06",
        44,
        _VERSION_WIDE,
        _VERSION_WIDE,
        0,
        0,
        count,
        count,
        length_bytes,
        directory_at,
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, directory_at + length_bytes, 1)
    few = min(count, 0xFFFF)
    narrow = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, few, few, min(length_bytes, _WIDE), min(directory_at, _WIDE), 0
    )
    return wide + locator + narrow
