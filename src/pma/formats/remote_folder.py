"""The folder that a checkpoint's files lie in, in a store: as `LocalFolder`, by range reads, several at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TypeVar

from pma.errors import FormatError, IncompleteError, printable
from pma.remote import Entry, RemotePath

T = TypeVar("T")

#: one request asks for at most so many bytes; larger ones are cut, so that one that fails costs little
REQUEST_BYTES = 4 * 2**20
#: requests of one process that are under way at once
IN_FLIGHT = 16
# an answer takes as long to begin as this many bytes take to come, so reading over a gap is no slower
_GAP_BYTES = 2**18


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pma-read")


@dataclass
class _Request:
    """Bytes of one file that are asked for at once, and the buffers that parts of them go to."""

    name: str
    start: int
    stop: int
    into: list[tuple[int, memoryview]] = field(default_factory=list)


class RemoteFolder:
    """Files below a folder of a store, by names relative to it. Sizes and etags are from its listing."""

    is_remote = True

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        #: of no use: nothing that is read stays in this machine's cache
        self.forget_after_reading = False

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted."""
        return sorted(name for name, entry in self._listing("").items() if not entry.is_folder)

    def _listing(self, folder: str) -> Mapping[str, Entry]:
        place = (self.path / folder).place if folder else self.path.place
        return self.path.store.listing(place)

    def refresh(self) -> None:
        """Ask the store anew: what is told from here on is what is there now."""
        self.path.store.forget(self.path.place)

    def status(self, name: str) -> tuple[int, int]:
        """Size in bytes, and a number made from the file's etag."""
        folder, _, last = name.rpartition("/")
        found = self._listing(folder).get(last)
        if found is None:
            raise IncompleteError(f"{self.path / printable(name)} does not exist (any more)")
        if found.is_folder:
            raise FormatError(f"{self.path / printable(name)} is not a regular file")
        return found.size_bytes, found.stamp

    def size_bytes(self, name: str) -> int:
        """Size of a file in bytes."""
        return self.status(name)[0]

    def read(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` one after the other from `offset_bytes`. Raises IncompleteError where the file ends
        before.
        """
        self.read_many([(name, offset_bytes, buffers)])

    def read_many(self, parts: Iterable[tuple[str, int, Sequence[memoryview]]]) -> None:
        """As `read` for each part: neighbours in one request, several requests at once."""
        requests = _requests(parts)
        if len(requests) == 1:
            self._fill(requests[0])
        else:
            for filled in [_pool().submit(self._fill, request) for request in requests]:
                filled.result()

    def _fill(self, request: _Request) -> None:
        place = (self.path / request.name).place
        data = self.path.store.read(place, request.start, request.stop - request.start)
        for offset, buffer in request.into:
            buffer[:] = data[offset - request.start : offset - request.start + len(buffer)]

    def read_whole(self, name: str, largest_bytes: int) -> bytes:
        """All bytes of a small file. Raises FormatError where it has more than are believable."""
        size = self.size_bytes(name)
        if size > largest_bytes:
            raise FormatError(
                f"{self.path / printable(name)} has {size} bytes; more than {largest_bytes} is not "
                "believable for it"
            )
        data = bytearray(size)
        self.read(name, 0, [memoryview(data)])
        return bytes(data)

    def each(self, function: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """`function` of every name, in order; many at once, because each may wait for the store."""
        if len(names) < 2:
            return [function(name) for name in names]
        # threads of its own: the function itself reads with those of the pool
        with ThreadPoolExecutor(min(IN_FLIGHT, len(names))) as pool:
            return list(pool.map(function, names))

    def descriptor(self, name: str, offset_bytes: int, length_bytes: int) -> None:
        """There is none: the file is not on this machine."""

    def close(self) -> None:
        """Nothing is held open."""


def _requests(parts: Iterable[tuple[str, int, Sequence[memoryview]]]) -> list[_Request]:
    """What to ask the store for: bytes of a file near each other at once, but not too many."""
    pieces = sorted(_pieces(parts), key=lambda piece: piece[:2])
    requests: list[_Request] = []
    for name, offset, buffer in pieces:
        last = requests[-1] if requests else None
        stop = offset + len(buffer)
        if (
            last is None
            or last.name != name
            or offset > last.stop + _GAP_BYTES
            or stop > last.start + REQUEST_BYTES
        ):
            requests.append(_Request(name, offset, stop, [(offset, buffer)]))
        else:
            last.stop = max(last.stop, stop)
            last.into.append((offset, buffer))
    return requests


def _pieces(
    parts: Iterable[tuple[str, int, Sequence[memoryview]]],
) -> Iterable[tuple[str, int, memoryview]]:
    for name, offset, buffers in parts:
        for buffer in buffers:
            cuts = [*range(0, len(buffer), REQUEST_BYTES), len(buffer)]
            for start, stop in pairwise(cuts):
                yield name, offset + start, buffer[start:stop]
            offset += len(buffer)
