"""Writes a checkpoint of any format into a folder: files of known size, filled in any order; then its
records.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from pma.errors import InputError, SpaceError, StorageError
from pma.formats.files import NO_ROOM, OpenFiles
from pma.quantities import bytes_text
from pma.types import Layout

# one call for 4 MiB takes up to three times as long as eight: the system looks for memory in larger pieces
_WRITE_BYTES = 2**19
# a checkpoint may have thousands of files, a process 1024 of them open
_MOST_OPEN = 64


class FolderWriter:
    """Writes what a layout describes into a folder that nobody else reads yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layout: Layout | None = None

    def create(self, layout: Layout) -> None:
        """Make every file at its full size, so that a full disk is found before the work. Files that have it
        already keep their bytes. Raises SpaceError.
        """
        self._layout = layout
        for file in layout.files:
            _make_parent(self._folder, file.name)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._folder / file.name, flags, 0o644)
            try:
                if os.fstat(descriptor).st_size != file.size_bytes:
                    os.ftruncate(descriptor, file.size_bytes)
                # reserve the room now: a full disk must be found before hours of reading
                os.posix_fallocate(descriptor, 0, max(file.size_bytes, 1))
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise _no_room(self._folder, layout, error) from error
                if error.errno == errno.EIO:
                    raise _write_error(self._folder / file.name, error) from error
                # else the file system cannot reserve
            finally:
                os.close(descriptor)

    def open_part(self) -> FolderPart:
        """A handle to write fragments through."""
        return FolderPart(self._folder)

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file, durable at once."""
        _make_parent(self._folder, name)
        path = self._folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o644)
        try:
            _write_exactly(descriptor, 0, memoryview(data), path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Write the layout's records; everything is durable afterwards."""
        assert self._layout is not None
        for name, data in self._layout.records.items():
            self.write_bytes(name, data)


class FolderPart:
    """One process's open output files. Implements `PartWriter`. `opened` is called after each is opened, and
    may refuse it.
    """

    def __init__(self, folder: Path, opened: Callable[[], object] | None = None) -> None:
        self._folder = folder
        self._files = OpenFiles(folder, most_idle=_MOST_OPEN, flags=os.O_WRONLY, opened=opened)
        self._unsynced: set[str] = set()

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        with self._files.use(file) as descriptor:
            _write_exactly(descriptor, offset_bytes, values, self._folder / file)
        self._unsynced.add(file)

    def sync(self) -> None:
        for file in sorted(self._unsynced):
            self._unsynced.discard(file)  # before the sync: a thread may write into it meanwhile
            with self._files.use(file) as descriptor:
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    raise _write_error(self._folder / file, error) from error

    def close(self) -> None:
        self._files.close()


def _make_parent(folder: Path, name: str) -> None:
    if "/" in name:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)


def _write_exactly(descriptor: int, offset_bytes: int, values: memoryview, path: Path) -> None:
    while len(values):
        try:
            count = os.pwrite(descriptor, values[:_WRITE_BYTES], offset_bytes)
        except OSError as error:
            raise _write_error(path, error) from error
        offset_bytes += count
        values = values[count:]


def _write_error(path: Path, error: OSError) -> InputError:
    kind = SpaceError if error.errno in NO_ROOM else StorageError
    return kind(f"{path}: writing failed: {error.strerror}")


def _no_room(folder: Path, layout: Layout, error: OSError) -> SpaceError:
    needed = bytes_text(sum(file.size_bytes for file in layout.files))
    return SpaceError(
        f"{folder.parent} has no room for the output's {needed} ({error.strerror}); "
        "free some space or choose another place"
    )
