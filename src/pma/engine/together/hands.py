"""What a process of several writes its blocks with: files that all write into, or files of its own that it
sends to a store.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pma.engine import provenance
from pma.engine.lease import LEASE_FILE, Lease
from pma.engine.plan import Plan
from pma.engine.staging import built_at, make_private, private_folder
from pma.engine.stream import Digests
from pma.engine.together.places import Arrived, is_begun_or_made, stamp_of
from pma.errors import PmaError, UsageError
from pma.formats.contracts import PartWriter
from pma.formats.folder_writer import FolderPart, FolderWriter
from pma.remote import RemotePath

# a folder that is without a lease for so long is of one who was killed before it took it
_BEGUN_SECONDS = 60.0
_TRIES = 10
# files that are sent at once; the driver sends parts of a large one at once, too
_AT_ONCE = 4


class Hand(PartWriter, Protocol):
    """A `PartWriter` that tells which chunks are safe.

    `sent`: of files in a store that are, what they were when they arrived.
    """

    sent: dict[str, Arrived]

    def settle(self, new: Digests) -> Digests:
        """These were written since this was called last; returns those that became safe."""

    @property
    def is_settled(self) -> bool:
        """Whether all that was written is safe."""


class FolderHand:
    """A hand on files that others write too: safe is what is synced. `check`: see `FolderPart`."""

    def __init__(self, folder: Path, check: Callable[[], object]) -> None:
        self._part = FolderPart(folder, opened=check)
        self.sent: dict[str, Arrived] = {}
        self.is_settled = True

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        self._part.write(file, offset_bytes, values)

    def sync(self) -> None:
        self._part.sync()

    def close(self) -> None:
        self._part.close()

    def settle(self, new: Digests) -> Digests:
        if new:
            self.sync()
        return new


class SendingHand:
    """A hand on whole files of its own, in a local folder that nobody else has: a file is sent when its last
    block is written, and then removed here. Safe is what arrived. `check` is called before a file is sent,
    and may refuse it. `sha256`: take that of each file, by reading it before it is sent.
    """

    def __init__(
        self,
        plan: Plan,
        numbers: Iterable[int],
        out: RemotePath,
        local: Path,
        check: Callable[[], object],
        *,
        sha256: bool = False,
    ) -> None:
        self._out, self._local, self._check, self._sha256 = out, local, check, sha256
        self.sent: dict[str, Arrived] = {}
        self._made: dict[str, Digests] = {}
        self._arriving: dict[str, Future[Arrived]] = {}
        _make(local)
        self._lease = Lease(local, out)
        _remove_left_over(local.parent, out, mine=local)
        self._chunks = Counter(plan.blocks.file_of(number) for number in numbers)
        mine = tuple(file for file in plan.layout.files if file.name in self._chunks)
        self._part = FolderPart(local)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pma-send")
        try:
            FolderWriter(local).create(replace(plan.layout, files=mine))
        except BaseException:
            self.close()
            raise

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        self._part.write(file, offset_bytes, values)

    def sync(self) -> None:
        """Nothing has to last here."""

    def settle(self, new: Digests) -> Digests:
        for (file, number), digest in new.items():
            made = self._made.setdefault(file, {})
            made[file, number] = digest
            if len(made) == self._chunks[file]:
                self._arriving[file] = self._pool.submit(self._send, file)
        safe: Digests = {}
        for file in [file for file, arriving in self._arriving.items() if arriving.done()]:
            self.sent[file] = self._arriving.pop(file).result()
            (self._local / file).unlink()
            safe |= self._made.pop(file)
        return safe

    def _send(self, file: str) -> Arrived:
        self._check()
        digest = {"sha256": provenance.sha256(self._local, file)} if self._sha256 else {}
        entry = self._out.store.send(self._local / file, (self._out / file).place)
        try:
            self._check()
        except PmaError:  # it may have been underway while everything was removed
            if not is_begun_or_made(self._out):
                self._out.store.remove((self._out / file).place)
            raise
        return {"stamp": stamp_of(entry), **digest}

    @property
    def is_settled(self) -> bool:
        return not self._made

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._part.close()
        shutil.rmtree(self._local, ignore_errors=True)
        self._lease.release()
        with suppress(OSError):  # another process has files there
            self._local.parent.rmdir()


def local_folder(out: RemotePath, name: str, staging: Path | None) -> Path:
    """Where a process builds the files that it sends, if `name` is its alone."""
    if staging is None:
        make_private(private_folder())
    return _parts_folder(out, staging) / name


def _parts_folder(out: RemotePath, staging: Path | None) -> Path:
    built = built_at(out, staging)
    return built.parent / f"{built.name}-parts"


def _make(local: Path) -> None:
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # one who ended took the folder above it away, empty as it was then
            return local.mkdir(parents=True)
    return local.mkdir(parents=True)


def remove_left_over(out: RemotePath, staging: Path | None) -> None:
    """The output is there: remove what processes that were killed left of it, on this machine."""
    folder = _parts_folder(out, staging)
    with suppress(FileNotFoundError):
        _remove_left_over(folder, out)
    with suppress(OSError):
        folder.rmdir()


def _remove_left_over(parts: Path, out: RemotePath, *, mine: Path | None = None) -> None:
    for folder in parts.iterdir():
        if folder == mine:
            continue
        with suppress(UsageError, FileNotFoundError):  # it lives, or another removes it
            if (folder / LEASE_FILE).is_file():
                lease = Lease(folder, out)
                shutil.rmtree(folder, ignore_errors=True)
                lease.release()
            elif mine is None or time.time() - folder.stat().st_mtime > _BEGUN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
