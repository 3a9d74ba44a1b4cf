"""Which chunks of an unfinished output are done: appended to a file only after their bytes are on the disk.

Each line is a checksum and a JSON object; the first says what is being made. Reading stops at the first line
that is not whole, which is where a crash cut it, or where its writer has not yet got to. A process that works
on another's output has a journal of its own there, and says more in it.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from pma.engine.stream import Digests
from pma.errors import IncompleteError
from pma.remote import RemotePath

P = TypeVar("P", bound=Path)

JOURNAL_FILE = ".pma-journal"
_PART_PREFIX, _DRIVER_PREFIX = ".pma-part-", ".pma-driver-"
_TOKEN_CHARACTERS = 16  # of the lease under which a journal was begun
_CHECKSUM_CHARACTERS = 16
# stores tell times in seconds; a shorter beat would show nothing
_BEAT_SECONDS = 2.0


def driver_journal(token: str) -> str:
    """The file in which the process that holds the lease with `token` speaks to others."""
    return f"{_DRIVER_PREFIX}{token[:_TOKEN_CHARACTERS]}"


def part_journal(token: str, name: str) -> str:
    """The journal of another process, `name`, that works under that lease."""
    return f"{_PART_PREFIX}{token[:_TOKEN_CHARACTERS]}-{name}"


def journals_of_others(folder: P, token: str = "") -> list[P]:
    """Such files in a folder, or in a place in a store: all, or those under one lease."""
    prefixes = (driver_journal(token), part_journal(token, "") if token else _PART_PREFIX)
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefixes))


class Journal:
    """The journal in `folder`. `heading` tells what is made, None for a new or unreadable one.

    `new`: there must be none of that name yet, or FileExistsError.
    """

    def __init__(self, folder: Path, name: str = JOURNAL_FILE, *, new: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if new else 0)
        self._descriptor = os.open(folder / name, flags, 0o644)
        self.heading: dict[str, Any] | None = None
        self.digests: Digests = {}
        self._end = 0
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        for value, end in _values(data):
            if self.heading is None:
                self.heading = value
            else:
                self.digests |= _chunks(value)
            self._end = end

    def start(self, heading: Mapping[str, Any]) -> None:
        """Begin anew: whatever the journal said is forgotten."""
        os.ftruncate(self._descriptor, 0)
        # before the heading is written: no power loss may leave it in front of what another merge had done
        os.fsync(self._descriptor)
        self.heading, self.digests, self._end = dict(heading), {}, 0
        self._append(heading)

    def add(self, digests: Digests, **more: object) -> None:
        """These chunks are done, and their bytes are on the disk: the caller has synced them before."""
        if digests:
            self._append({"chunks": _listed(digests), **more})
            self.digests |= digests

    def say(self, **what: object) -> None:
        """Something else, for whoever follows this journal."""
        self._append(what)

    def beat(self) -> None:
        """Show that we live."""
        os.utime(self._descriptor)

    def _append(self, value: Mapping[str, Any]) -> None:
        line = _line(value)
        # over a torn end, never after it
        os.ftruncate(self._descriptor, self._end)
        written = 0
        while written < len(line):
            written += os.pwrite(self._descriptor, line[written:], self._end + written)
        os.fsync(self._descriptor)
        self._end += len(line)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


class StoreJournal:
    """As `Journal`, a new one, at a place in a store: nothing can be appended there, so each line sends all.

    Thread-safe.
    """

    def __init__(self, path: RemotePath) -> None:
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists already", str(path))
        self._path, self._lines, self._sent_at = path, b"", 0.0
        self._lock = threading.Lock()

    def start(self, heading: Mapping[str, Any]) -> None:
        self._append(heading)

    def add(self, digests: Digests, **more: object) -> None:
        if digests:
            self._append({"chunks": _listed(digests), **more})

    def say(self, **what: object) -> None:
        self._append(what)

    def beat(self) -> None:
        with self._lock:
            if time.monotonic() - self._sent_at > _BEAT_SECONDS:
                self._send()

    def _append(self, value: Mapping[str, Any]) -> None:
        with self._lock:
            self._lines += _line(value)
            self._send()

    def _send(self) -> None:
        self._path.store.send_bytes(self._lines, self._path.place)
        self._sent_at = time.monotonic()

    def close(self) -> None:
        """Nothing is held."""


class Followed:
    """Another process's journal, read as it grows: `said` is all of its lines that are no chunks, in one.

    `changes` counts how often it was found changed, be it only in its time. `hold`: keep it open once it was
    found, so that its last words are heard even if it is removed.
    """

    def __init__(self, path: Path, *, hold: bool = False) -> None:
        self._path, self._hold, self._held = path, hold, -1
        self._lock = threading.Lock()
        self._end = self.changes = 0
        self._seen: tuple[int, ...] | None = None
        self.heading: dict[str, Any] | None = None
        self.said: dict[str, Any] = {}

    def news(self) -> Digests:
        """Chunks that it calls done since this was asked last; the rest goes into `said`. From any thread."""
        with self._lock:
            return self._news()

    def _news(self) -> Digests:
        found = self._read_from_store() if isinstance(self._path, RemotePath) else self._read_here()
        if found is None:
            return {}
        seen, data = found
        self.changes += seen != self._seen
        self._seen = seen
        new: Digests = {}
        start = self._end
        for value, end in _values(data):
            self._end = start + end
            if self.heading is None:
                self.heading = value
            else:
                new |= _chunks(value)
                self.said |= {what: told for what, told in value.items() if what != "chunks"}
        return new

    def _read_from_store(self) -> tuple[tuple[int, ...], bytes] | None:
        """As `_read_here`, as far as the listing of its folder is of now."""
        path = self._path
        assert isinstance(path, RemotePath)
        entry = path.store.listing(path.parent.place).get(path.name)
        if entry is None:
            return None
        seen = entry.size_bytes, entry.mtime_ns, entry.stamp
        try:
            new_bytes = max(entry.size_bytes - self._end, 0)
            return seen, path.store.read(path.place, self._end, new_bytes)
        except IncompleteError:
            return None  # it was removed meanwhile

    def _read_here(self) -> tuple[tuple[int, ...], bytes] | None:
        """Size and time, and what is new; None where there is no such file."""
        descriptor = self._opened()
        if descriptor < 0:
            return None
        try:
            found = os.fstat(descriptor)
            data = os.pread(descriptor, max(found.st_size - self._end, 0), self._end)
        finally:
            if descriptor != self._held:
                os.close(descriptor)
        return (found.st_size, found.st_mtime_ns), data

    def _opened(self) -> int:
        try:
            # opened anew each time: over a network, that is when others' changes are looked for
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return self._held
        if self._hold:
            self._let_go()
            self._held = descriptor
        return descriptor

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def _values(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The value of each whole line, and where the line ends."""
    end = 0
    for line in data.splitlines(keepends=True):
        value = _parsed(line)
        if value is None:
            return
        end += len(line)
        yield value, end


def _chunks(value: Mapping[str, Any]) -> Digests:
    return {(file, number): digest for file, number, digest in value.get("chunks", ())}


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _listed(digests: Digests) -> list[list[str | int]]:
    return [[file, number, digest] for (file, number), digest in digests.items()]


def _checksum(text: bytes) -> bytes:
    return blake3(text).hexdigest()[:_CHECKSUM_CHARACTERS].encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    checksum, text = line[:_CHECKSUM_CHARACTERS], line[_CHECKSUM_CHARACTERS + 1 : -1]
    if not line.endswith(b"\n") or checksum != _checksum(text):
        return None
    value: dict[str, Any] = json.loads(text)
    return value
