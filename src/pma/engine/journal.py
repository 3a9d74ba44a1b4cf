"""Which chunks of an unfinished output are done: appended to a file only after their bytes are on the disk.

Each line is a checksum and a JSON object; the first says what is being made. Reading stops at the first line
that is not whole, which is where a crash cut it, or where its writer has not yet got to. A process that works
on another's output has a journal of its own there, and says more in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.engine.stream import Digests

JOURNAL_FILE = ".pma-journal"
_PART_PREFIX, _DRIVER_PREFIX = ".pma-part-", ".pma-driver-"
_TOKEN_CHARACTERS = 16  # of the lease under which a journal was begun
_CHECKSUM_CHARACTERS = 16


def driver_journal(token: str) -> str:
    """The file in which the process that holds the lease with `token` speaks to others."""
    return f"{_DRIVER_PREFIX}{token[:_TOKEN_CHARACTERS]}"


def part_journal(token: str, name: str) -> str:
    """The journal of another process, `name`, that works under that lease."""
    return f"{_PART_PREFIX}{token[:_TOKEN_CHARACTERS]}-{name}"


def journals_of_others(folder: Path, token: str = "") -> list[Path]:
    """Such files in a folder: all, or those under one lease."""
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
            chunks = [[file, number, digest] for (file, number), digest in digests.items()]
            self._append({"chunks": chunks, **more})
            self.digests |= digests

    def say(self, **what: object) -> None:
        """Something else, for whoever follows this journal."""
        self._append(what)

    def beat(self) -> None:
        """Show that we live."""
        os.utime(self._descriptor)

    def _append(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        line = _checksum(text) + b" " + text + b"\n"
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


class Followed:
    """Another process's journal, read as it grows: `said` is all of its lines that are no chunks, in one.

    `changes` counts how often it was found changed, be it only in its time. `hold`: keep it open once it was
    found, so that its last words are heard even if it is removed.
    """

    def __init__(self, path: Path, *, hold: bool = False) -> None:
        self._path, self._hold, self._held = path, hold, -1
        self._end = self.changes = 0
        self._seen: tuple[int, int] | None = None
        self.heading: dict[str, Any] | None = None
        self.said: dict[str, Any] = {}

    def news(self) -> Digests:
        """Chunks that it calls done since this was asked last; the rest goes into `said`."""
        descriptor = self._opened()
        if descriptor < 0:
            return {}
        try:
            found = os.fstat(descriptor)
            data = os.pread(descriptor, max(found.st_size - self._end, 0), self._end)
        finally:
            if descriptor != self._held:
                os.close(descriptor)
        self.changes += (found.st_size, found.st_mtime_ns) != self._seen
        self._seen = found.st_size, found.st_mtime_ns
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

    def _opened(self) -> int:
        try:
            # opened anew each time: over a network, that is when others' changes are looked for
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return self._held
        if self._hold:
            self.close()
            self._held = descriptor
        return descriptor

    def close(self) -> None:
        """Let go of the file."""
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


def _checksum(text: bytes) -> bytes:
    return blake3(text).hexdigest()[:_CHECKSUM_CHARACTERS].encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    checksum, text = line[:_CHECKSUM_CHARACTERS], line[_CHECKSUM_CHARACTERS + 1 : -1]
    if not line.endswith(b"\n") or checksum != _checksum(text):
        return None
    value: dict[str, Any] = json.loads(text)
    return value
