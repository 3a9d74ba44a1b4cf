"""Positional reads from many files with few of them open: short reads are errors, neighbours are read
together.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pma.errors import FormatError, IncompleteError, StorageError
from pma.formats.contracts import ReadRequest

#: error numbers of a full disk or quota
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOST_BUFFERS = 512  # a call of preadv takes at most IOV_MAX buffers, 1024 on Linux


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OpenFiles:
    """A thread-safe cache of open files, so that ten checkpoints of 163 shards stay below the limit of open
    files.

    A file in use is never closed: users are counted, and only idle ones beyond `most_idle` go. `opened` is
    called after each is opened, and may refuse it.
    """

    def __init__(
        self,
        folder: Path,
        most_idle: int = 2,
        flags: int = os.O_RDONLY,
        opened: Callable[[], object] | None = None,
    ) -> None:
        self._folder = folder
        self._check = opened
        self._most_idle = most_idle
        self._flags = flags
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # name -> [descriptor, users]

    @contextmanager
    def use(self, name: str) -> Iterator[int]:
        """The descriptor of `name`, kept open while in the block."""
        with self._lock:
            if name not in self._open:
                self._open[name] = [self._opened(name), 0]
            self._open.move_to_end(name)
            entry = self._open[name]
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                self._close_idle(self._most_idle)

    def _opened(self, name: str) -> int:
        descriptor = open_file(self._folder / name, self._flags)
        try:
            if self._check is not None:
                self._check()
        except BaseException:
            os.close(descriptor)  # no other thread may take it for one that may be used
            raise
        return descriptor

    def _close_idle(self, keep: int) -> None:
        idle = [name for name, (_, users) in self._open.items() if users == 0]
        for name in idle[: max(0, len(idle) - keep)]:
            os.close(self._open.pop(name)[0])

    def close(self) -> None:
        """Close every file that is not in use; they are opened again when wanted."""
        with self._lock:
            self._close_idle(0)

    def __del__(self) -> None:
        self.close()  # of a reader that refused its checkpoint, nobody else would


def is_inside(name: object) -> bool:
    """Whether `name` from an untrusted file names something below the folder it is relative to."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        return False
    return not name.startswith("/") and all(part not in ("", ".", "..") for part in name.split("/"))


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that exists. Raises FormatError for a folder or device (a pipe would block for
    ever).
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise IncompleteError(
            f"{path} does not exist (any more); a checkpoint needs all of its files"
        ) from error
    except OSError as error:
        raise FormatError(f"{path} cannot be opened: {error.strerror}") from error
    if not os.path.isfile(path):
        os.close(descriptor)
        raise FormatError(f"{path} is not a regular file")
    return descriptor


def read_exactly(descriptor: int, offset_bytes: int, buffers: Sequence[memoryview], path: Path) -> None:
    """Fill `buffers` one after the other from `offset_bytes`. Raises IncompleteError where the file ends
    before.
    """
    waiting = [buffer for buffer in buffers if len(buffer)]
    while waiting:
        try:
            count = os.preadv(descriptor, waiting[:_MOST_BUFFERS], offset_bytes)
        except OSError as error:
            raise StorageError(f"{path}: reading at byte {offset_bytes} failed: {error.strerror}") from error
        if count == 0:
            raise IncompleteError(
                f"{path} ends at byte {offset_bytes}, before the data its header promises; "
                "it was cut short, or changed while it was read"
            )
        offset_bytes += count
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.pop(0))
        if count:
            waiting[0] = waiting[0][count:]


def coalesced(requests: Sequence[ReadRequest]) -> Iterator[tuple[str, int, list[memoryview]]]:
    """Requests in the order given, neighbours in the same file as one (file, offset, buffers).

    Small gaps between them are read too, and dropped: rows of a shard in columns are a few kilobytes each,
    and a call costs more than copying as much again.
    """
    file, start, end = "", -1, -1
    buffers: list[memoryview] = []
    for request in requests:
        gap = request.offset_bytes - end
        if buffers and request.file == file and 0 <= gap <= len(_DROPPED):
            if gap:
                buffers.append(_DROPPED[:gap])
        else:
            if buffers:
                yield file, start, buffers
            file, start, buffers = request.file, request.offset_bytes, []
        buffers.append(request.into)
        end = request.offset_bytes + len(request.into)
    if buffers:
        yield file, start, buffers


# what is written here, by any number of threads at a time, nobody reads
_DROPPED = memoryview(bytearray(2**14))
