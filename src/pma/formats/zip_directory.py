"""The directory of a zip archive as torch writes it, read strictly: stored members only, each in a place of
its own.

Source: PKWARE's APPNOTE 6.3, sections 4.3 to 4.5. Whether a member's bytes begin where the directory makes
believe is told by its local header, whose name and extra fields may have other lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from pma.errors import FormatError, IncompleteError, printable
from pma.formats.folder import Folder

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_WIDE = 0xFFFFFFFF  # a field of 32 bits that stands in an extra field of 64
_ENCRYPTED, _SIZES_FOLLOW = 0x1 | 0x40 | 0x2000, 0x8
_WIDE_EXTRA = 1
_EXTRA_BYTES = 192  # torch pads a local header to 64 bytes; one read gets it all
_LARGEST_DIRECTORY_BYTES = 32 * 2**20
_LARGEST_NAME_BYTES = 4096
_DENSE_BYTES, _WINDOW_BYTES = 2**14, 2**18


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Where a member's bytes lie in the file."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, kw_only=True)
class ZipDirectory:
    """Members by name, and a digest of all that says where they lie."""

    members: Mapping[str, Member]
    digest: str


def read_directory(folder: Folder, file: str, start: int, stop: int) -> ZipDirectory:
    """The members of the archive at bytes `start` to `stop` of a file.

    Raises FormatError for anything that torch would not write, IncompleteError where the end is missing.
    """
    where = f"{folder.path / file}"
    directory_at, length, count = _find(folder, file, start, stop, where)
    if length > _LARGEST_DIRECTORY_BYTES or count * _CENTRAL.size > length:
        raise FormatError(
            f"{where}: a zip directory of {length} bytes for {count} members is not believable; "
            f"at most {_LARGEST_DIRECTORY_BYTES} bytes are read"
        )
    data = _read(folder, file, directory_at, length)
    digest = blake3(data)
    listed = _members(data, count, where)
    members: dict[str, Member] = {}
    end = start
    headers = _Headers(folder, file, directory_at, dense=directory_at - start < count * _DENSE_BYTES)
    for name, local_at, length_bytes in sorted(listed, key=lambda row: row[1]):
        at = start + local_at
        if at < end:
            raise FormatError(f"{where}: member {printable(name)} overlaps the one before it")
        header = headers.read(at, _LOCAL.size + len(name.encode()) + _EXTRA_BYTES)
        begins = at + _local_length(header, name, length_bytes, where)
        end = begins + length_bytes
        if end > directory_at:
            raise FormatError(
                f"{where}: member {printable(name)} of {length_bytes} bytes ends behind the zip directory"
            )
        digest.update(header[: begins - at])
        members[name] = Member(offset_bytes=begins, length_bytes=length_bytes)
    return ZipDirectory(members=members, digest=digest.hexdigest())


class _Headers:
    """Reads headers in ascending order; where members are small, many headers at once."""

    def __init__(self, folder: Folder, file: str, stop: int, *, dense: bool) -> None:
        self._folder, self._file, self._stop = folder, file, stop
        self._least_bytes = _WINDOW_BYTES if dense else 0
        self._data, self._at = b"", 0

    def read(self, at: int, length_bytes: int) -> bytes:
        """Bytes from `at`, fewer at the end."""
        length = min(length_bytes, self._stop - at)
        if not self._at <= at <= at + length <= self._at + len(self._data):
            window = min(max(length, self._least_bytes), self._stop - at)
            self._data, self._at = _read(self._folder, self._file, at, window), at
        return self._data[at - self._at : at - self._at + max(length, 0)]


def _read(folder: Folder, file: str, offset_bytes: int, length_bytes: int) -> bytes:
    data = bytearray(max(length_bytes, 0))
    folder.read(file, offset_bytes, [memoryview(data)])
    return bytes(data)


def _find(folder: Folder, file: str, start: int, stop: int, where: str) -> tuple[int, int, int]:
    """Where the directory lies in the file, its length, and how many members it lists."""
    tail_at = max(stop - _END.size - _LOCATOR_64.size - _END_64.size, start)
    tail = _read(folder, file, tail_at, stop - tail_at)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise IncompleteError(
            f"{where} has no zip directory at its end; it was cut short, or is being written"
        )
    _, disk, first_disk, here, count, length, offset, comment = _END.unpack(tail[-_END.size :])
    end = stop - _END.size
    if (
        _LOCATOR_64.size <= len(tail) - _END.size
        and tail[-_END.size - _LOCATOR_64.size :][:4] == b"PK\x06\x07"
    ):
        end = stop - len(tail)
        fields = (
            _END_64.unpack(tail[: _END_64.size]) if len(tail) >= _END_64.size + _END.size else (b"",) * 10
        )
        locator = _LOCATOR_64.unpack(tail[-_END.size - _LOCATOR_64.size : -_END.size])
        if fields[0] != b"PK\x06\x06" or fields[1] != _END_64.size - 12 or start + locator[2] != end:
            raise FormatError(f"{where}: the end of the zip directory contradicts itself")
        narrow = (here, count, length, offset)
        _, _, _, _, disk, first_disk, here, count, length, offset = fields
        for small, large in zip(narrow, (here, count, length, offset), strict=True):
            if small not in (large, 0xFFFF, _WIDE):
                raise FormatError(f"{where}: the two ends of the zip directory contradict each other")
    if disk or first_disk or comment or here != count:
        raise FormatError(f"{where}: the zip archive has several parts or a comment; torch writes neither")
    if start + offset + length != end:
        raise FormatError(
            f"{where}: the zip directory is said to be {length} bytes at {offset}, which does not end where "
            f"it must, at {end - start}; the file was cut short, or changed"
        )
    return start + offset, length, count


def _members(data: bytes, count: int, where: str) -> list[tuple[str, int, int]]:
    """(name, offset of the local header, bytes) of every member that the directory lists."""
    found: dict[str, tuple[str, int, int]] = {}
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data):
            raise FormatError(f"{where}: the zip directory ends within a member")
        row = _CENTRAL.unpack_from(data, at)
        (signature, _, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes, comment_bytes) = row[
            :13
        ]
        local_at = row[16]
        name_at = at + _CENTRAL.size
        at = name_at + name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or at > len(data) or name_bytes > _LARGEST_NAME_BYTES:
            raise FormatError(f"{where}: the zip directory is damaged at byte {name_at - _CENTRAL.size}")
        name = _name(data[name_at : name_at + name_bytes], where)
        extra = data[name_at + name_bytes : name_at + name_bytes + extra_bytes]
        size, packed, local_at = _widened(extra, (size, packed, local_at), name, where)
        if flags & _ENCRYPTED:
            raise FormatError(f"{where}: member {printable(name)} is encrypted; torch stores members openly")
        if method != 0 or packed != size:
            raise FormatError(
                f"{where}: member {printable(name)} is compressed; torch stores members as they are. "
                "Save the checkpoint again with torch.save"
            )
        if name in found:
            raise FormatError(f"{where}: member {printable(name)} occurs twice")
        found[name] = (name, local_at, size)
    if at != len(data):
        raise FormatError(f"{where}: the zip directory lists {count} members and goes on behind them")
    return list(found.values())


def _name(data: bytes, where: str) -> str:
    try:
        name = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: a member's name is not text: {printable(repr(data))}") from error
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in name:
        raise FormatError(f"{where}: member {printable(name)!r} leads out of the archive")
    return name


def _widened(extra: bytes, narrow: tuple[int, ...], name: str, where: str) -> tuple[int, ...]:
    """Sizes and offset, those that do not fit 32 bits taken from the extra field, in its order."""
    if _WIDE not in narrow:
        return narrow
    values = list(narrow)
    wide = _extra_field(extra, _WIDE_EXTRA)
    for i, value in enumerate(narrow):
        if value == _WIDE:
            if len(wide) < 8:
                raise FormatError(f"{where}: member {printable(name)} lacks its size of 64 bits")
            values[i], wide = int.from_bytes(wide[:8], "little"), wide[8:]
    return tuple(values)


def _extra_field(extra: bytes, wanted: int) -> bytes:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == wanted:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def _local_length(header: bytes, name: str, length_bytes: int, where: str) -> int:
    """Bytes from a member's local header to its data, after checking that it agrees with the directory."""
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise FormatError(f"{where}: member {printable(name)} does not begin where the zip directory says")
    _, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    begins = _LOCAL.size + name_bytes
    if header[_LOCAL.size : begins] != name.encode("utf-8"):
        raise FormatError(f"{where}: the zip directory and member {printable(name)} disagree about its name")
    if flags & _ENCRYPTED or method != 0:
        raise FormatError(f"{where}: member {printable(name)} is compressed or encrypted")
    extra = header[begins : begins + extra_bytes]
    size, packed = _widened(extra, (size, packed), name, where) if _WIDE in (size, packed) else (size, packed)
    follow = bool(flags & _SIZES_FOLLOW) and size == packed == 0
    if not follow and (size, packed) != (length_bytes, length_bytes):
        raise FormatError(
            f"{where}: the zip directory gives member {printable(name)} {length_bytes} bytes, "
            f"the member itself {size}"
        )
    return int(begins + extra_bytes)
