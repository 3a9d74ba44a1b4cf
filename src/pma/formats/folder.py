"""The folder that a checkpoint's files lie in: positional reads, and what tells whether a file has changed.

What it offers is all that readers use, so that a remote store can stand in its place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pma.errors import FormatError, IncompleteError
from pma.formats.files import OpenFiles, read_exactly


class LocalFolder:
    """Files below a folder of this machine, by names relative to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: leave no page of what is read in the system's cache
        self.forget_after_reading = False
        self._files = OpenFiles(path)

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted."""
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file())

    def status(self, name: str) -> tuple[int, int]:
        """Size in bytes, and a number that changes when the file does (here its time in nanoseconds)."""
        try:
            found = os.stat(self.path / name)
        except FileNotFoundError as error:
            raise IncompleteError(f"{self.path / name} does not exist (any more)") from error
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
