"""Which chunks of an unfinished output are done: appended to a file only after their bytes are on the disk.

Each line is a checksum and a JSON object; the first says what is being made. Reading stops at the first line
that is not whole, which is where a crash cut it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.engine.stream import Digests

JOURNAL_FILE = ".pma-journal"
_CHECKSUM_CHARACTERS = 16


class Journal:
    """The journal in `folder`. `heading` tells what is made, None for a new or unreadable one."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(folder / JOURNAL_FILE, flags, 0o644)
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
        for line in data.splitlines(keepends=True):
            value = _parsed(line)
            if value is None:
                break
            if self.heading is None:
                self.heading = value
            else:
                self.digests |= {(file, number): digest for file, number, digest in value["chunks"]}
            self._end += len(line)

    def start(self, heading: Mapping[str, Any]) -> None:
        """Begin anew: whatever the journal said is forgotten."""
        os.ftruncate(self._descriptor, 0)
        # before the heading is written: no power loss may leave it in front of what another merge had done
        os.fsync(self._descriptor)
        self.heading, self.digests, self._end = dict(heading), {}, 0
        self._append(heading)

    def add(self, digests: Digests) -> None:
        """These chunks are done, and their bytes are on the disk: the caller has synced them before."""
        if digests:
            self._append({"chunks": [[file, number, digest] for (file, number), digest in digests.items()]})
            self.digests |= digests

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


def _checksum(text: bytes) -> bytes:
    return blake3(text).hexdigest()[:_CHECKSUM_CHARACTERS].encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    checksum, text = line[:_CHECKSUM_CHARACTERS], line[_CHECKSUM_CHARACTERS + 1 : -1]
    if not line.endswith(b"\n") or checksum != _checksum(text):
        return None
    value: dict[str, Any] = json.loads(text)
    return value
