"""The folder that a checkpoint's files lie in: positional reads, and what tells whether a file has changed.

What it offers is all that readers use, so that a store can stand in its place (`remote_folder`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from pma.errors import FormatError, IncompleteError
from pma.formats.files import OpenFiles, read_exactly

T = TypeVar("T")

# as the chunks that outputs have digests of
_CHUNK_BYTES = 4 * 2**20
_CHUNKS_AHEAD = 8


class Folder(Protocol):
    """What readers use of a folder; see `LocalFolder` for what each does."""

    is_remote: bool
    forget_after_reading: bool

    @property
    def path(self) -> Path:
        """Where it is."""

    def names(self) -> list[str]: ...
    def refresh(self) -> None: ...
    def status(self, name: str) -> tuple[int, int]: ...
    def size_bytes(self, name: str) -> int: ...
    def read(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None: ...
    def read_many(self, parts: Iterable[tuple[str, int, Sequence[memoryview]]]) -> None: ...
    def read_whole(self, name: str, largest_bytes: int) -> bytes: ...
    def each(self, function: Callable[[str], T], names: Sequence[str]) -> list[T]: ...
    def descriptor(
        self, name: str, offset_bytes: int, length_bytes: int
    ) -> AbstractContextManager[int] | None: ...
    def close(self) -> None: ...


def open_folder(path: Path) -> Folder:
    """The folder at `path`, on this machine or in a store."""
    if isinstance(path, Path):
        return LocalFolder(path)
    # else a place in a store, which is a Path only to type checkers
    from pma.formats.remote_folder import RemoteFolder

    return RemoteFolder(path)


def chunks_of(
    folder: Folder, name: str, size_bytes: int, chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[memoryview]:
    """A file's bytes in order, `chunk_bytes` at a time; each is valid until the next."""
    ahead = _CHUNKS_AHEAD if folder.is_remote else 1
    buffers = [memoryview(bytearray(chunk_bytes)) for _ in range(ahead)]
    for start in range(0, size_bytes, ahead * chunk_bytes):
        offsets = range(start, min(start + ahead * chunk_bytes, size_bytes), chunk_bytes)
        parts = [
            buffer[: min(chunk_bytes, size_bytes - offset)]
            for buffer, offset in zip(buffers, offsets, strict=False)
        ]
        folder.read_many((name, offset, [part]) for offset, part in zip(offsets, parts, strict=True))
        yield from parts


class LocalFolder:
    """Files below a folder of this machine, by names relative to it."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path
        #: leave no page of what is read in the system's cache
        self.forget_after_reading = False
        self._files = OpenFiles(path)

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted."""
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file())

    def refresh(self) -> None:
        """Forget what was told of files; here nothing is remembered."""

    def status(self, name: str) -> tuple[int, int]:
        """Size in bytes, and a number that changes when the file does (here its time in nanoseconds)."""
        try:
            found = os.stat(self.path / name)
        except FileNotFoundError as error:
            raise IncompleteError(f"{self.path / name} does not exist (any more)") from error
        except OSError as error:  # a link to itself, a name too long
            raise FormatError(f"{self.path / name} cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{self.path / name} is not a regular file")
        return found.st_size, found.st_mtime_ns

    def size_bytes(self, name: str) -> int:
        """Size of a file in bytes."""
        return self.status(name)[0]

    def read(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` one after the other from `offset_bytes`. Raises IncompleteError where the file ends
        before.
        """
        length = sum(len(buffer) for buffer in buffers)
        with self.descriptor(name, offset_bytes, length) as descriptor:
            read_exactly(descriptor, offset_bytes, buffers, self.path / name)

    def read_many(self, parts: Iterable[tuple[str, int, Sequence[memoryview]]]) -> None:
        """As `read` for each part, in the order given; a store reads them at once."""
        for name, offset_bytes, buffers in parts:
            self.read(name, offset_bytes, buffers)

    def each(self, function: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """`function` of every name, in order; a store is asked for many at once."""
        return [function(name) for name in names]

    def read_whole(self, name: str, largest_bytes: int) -> bytes:
        """All bytes of a small file. Raises FormatError where it has more than are believable."""
        size = self.size_bytes(name)
        if size > largest_bytes:
            raise FormatError(
                f"{self.path / name} has {size} bytes; more than {largest_bytes} is not believable for it"
            )
        data = bytearray(size)
        self.read(name, 0, [memoryview(data)])
        return bytes(data)

    @contextmanager
    def descriptor(self, name: str, offset_bytes: int, length_bytes: int) -> Iterator[int]:
        """The open file, to read those bytes of it by position in the block."""
        with self._files.use(name) as descriptor:
            yield descriptor
            if self.forget_after_reading:
                os.posix_fadvise(descriptor, offset_bytes, length_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close what is open."""
        self._files.close()
