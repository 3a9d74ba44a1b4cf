"""One output while it is built: its lease, its journal, its files; resumed, kept up, finished or left
behind.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pma.engine import provenance
from pma.engine.blocks import CHUNK_BYTES
from pma.engine.journal import JOURNAL_FILE, Followed, Journal, journals_of_others
from pma.engine.lease import LEASE_FILE, Lease
from pma.engine.plan import Plan
from pma.engine.staging import (
    clear,
    make_staging_folder,
    publish,
    refuse_existing,
    sync_folders,
)
from pma.engine.stopping import StopFlag
from pma.engine.stream import Digests, Output
from pma.errors import UsageError
from pma.formats.files import sync_folder
from pma.formats.folder_writer import FolderWriter

SAVE_SECONDS = 5.0
_REMOVALS = 10


class Building:
    """The hidden folder of one output, held by this process from `__init__` to `close`.

    Nothing that an earlier attempt left is touched before `begin`. Raises UsageError where the output exists
    or somebody else builds it.
    """

    def __init__(self, plan: Plan, out: Path, *, break_lock: bool = False) -> None:
        self.plan, self.out = plan, out
        self.folder, self._lease = _leased(out, break_lock=break_lock)
        try:
            sync_folder(self.folder)  # first of all the lease: it tells whose the rest is
            self._journal = Journal(self.folder)
        except BaseException:
            self._lease.release()
            raise
        self._writer = FolderWriter(self.folder)
        self._part = self._writer.open_part()
        self._heard: Digests = {}
        self.output = Output(part=self._part)

    def begin(self, *, fresh: bool = False) -> None:
        """Take over what an earlier attempt had finished, or start anew; make the files.

        `output.digests` holds what is done. Raises UsageError where an earlier attempt was of another merge.
        """
        try:
            self._resume_or_start(fresh=fresh)
            self._writer.create(self.plan.layout)
            sync_folders(self.folder)
        except BaseException as error:
            if not isinstance(error, UsageError) and not self.is_resumable:
                self.discard()
            self.close()
            raise
        self.output.digests |= self._journal.digests

    def _resume_or_start(self, *, fresh: bool) -> None:
        heading = provenance.heading(self.plan)
        earlier = self._journal.heading
        if earlier is not None and earlier != heading and not fresh:
            what = "sources" if earlier.get("sources") != heading["sources"] else "options"
            raise UsageError(
                f"an earlier merge to {self.out} was interrupted, and its {what} were not the same; "
                "repeat that command to go on, or say --fresh to start over"
            )
        others = journals_of_others(self.folder)
        ours = [path.name for path in journals_of_others(self.folder, self.token)]
        if earlier == heading and not fresh:
            self._heard = _chunks_of_others(others, heading)
            if self._files_are_whole():
                self._journal.add({c: d for c, d in self._heard.items() if c not in self._journal.digests})
                weights = [file.name for file in self.plan.layout.files]
                clear(self.folder, but=(LEASE_FILE, JOURNAL_FILE, *ours, *weights))
                return
        clear(self.folder, but=(LEASE_FILE, JOURNAL_FILE, *ours))
        self._heard = {}
        if others:  # no power loss may bring them back beside files that are made anew
            sync_folder(self.folder)
        self._journal.start(heading)

    def _files_are_whole(self) -> bool:
        chunks = (*self._journal.digests, *self._heard)
        sizes = {name: _size_bytes(self.folder / name) for name in {name for name, _ in chunks}}
        return all(sizes.get(f.name, f.size_bytes) == f.size_bytes for f in self.plan.layout.files)

    @property
    def token(self) -> str:
        """Of our lease: what other processes that work here know us by."""
        return self._lease.token

    def hear(self, digests: Digests, sent: Mapping[str, object] | None = None) -> None:
        """Others finished these chunks and journaled them here, where nothing needs to be sent."""
        self._heard |= digests
        self.output.digests |= digests

    @property
    def bytes_done(self) -> int:
        """Bytes of finished chunks, as far as this process knows."""
        return self.bytes_of(list(self.output.digests))

    def bytes_of(self, chunks: Iterable[tuple[str, int]]) -> int:
        """Bytes of some chunks of the output."""
        sizes = {file.name: file.size_bytes for file in self.plan.layout.files}
        return sum(min(CHUNK_BYTES, sizes[file] - number * CHUNK_BYTES) for file, number in chunks)

    def show_life(self) -> None:
        """Let others see that we live."""
        self._lease.touch()

    def save(self) -> None:
        """Sync what is written, then say so in the journal; show that we live."""
        self._lease.beat()
        new = self.output.taken()  # before the sync: what comes later is for the next time
        if new:
            self._part.sync()
            self._journal.add(new)

    def finish(self, *, sha256: bool = False, hash_sources: bool = False) -> dict[str, Any]:
        """All blocks are written: add what belongs beside them and give the folder its name. Returns the
        record.
        """
        self._part.sync()
        plan = self.plan
        provenance.check_unchanged(plan)
        beside = plan.options.like or plan.sources[-1].point.folder
        self._writer.finish()
        for name, data in plan.side_files.items():
            self._writer.write_bytes(name, data)
        origins = {name: str((beside / name).resolve()) for name in plan.side_files}
        hashing = partial(provenance.sha256, self.folder) if sha256 else None
        value = provenance.record(plan, self.output.digests, origins, sha256_of=hashing)
        if hash_sources:
            provenance.add_source_digests(value)
        self._writer.write_bytes(provenance.RECORD_FILE, provenance.encode(value))
        self._lease.beat()
        publish(self.folder, self.out)
        return value

    @property
    def is_resumable(self) -> bool:
        """Whether an attempt after this one would find something done."""
        return bool(self._journal.digests or self._heard)

    @property
    def is_new(self) -> bool:
        """Whether no attempt was begun here before."""
        return self._journal.heading is None

    @property
    def is_ours(self) -> bool:
        """Whether no other process broke our lease."""
        return self._lease.is_held()

    def discard(self) -> None:
        """Remove everything, unless it is another's by now: no later attempt could use it."""
        if self.is_ours:
            clear(self.folder, but=(LEASE_FILE,))
            sync_folder(self.folder)  # the lease last: without it nobody could tell whose the rest is
            _remove(self.folder)

    def close(self) -> None:
        """Let go of lease and files."""
        self._part.close()
        self._journal.close()
        self._lease.release()


def _leased(out: Path, *, break_lock: bool) -> tuple[Path, Lease]:
    while True:
        folder = make_staging_folder(out)
        try:
            lease = Lease(folder, out, break_lock=break_lock)
        except FileNotFoundError:
            continue  # its holder finished and took the folder away meanwhile
        try:
            refuse_existing(out)
            for contender in folder.glob(f"{LEASE_FILE}.*"):
                contender.unlink(missing_ok=True)
        except BaseException:
            lease.release()
            raise
        return folder, lease


def _chunks_of_others(paths: Sequence[Path], heading: Mapping[str, Any]) -> Digests:
    """What processes of an earlier attempt at the same merge did, each by its own journal."""
    found: Digests = {}
    for path in paths:
        journal = Followed(path)
        chunks = journal.news()
        if journal.heading is not None and journal.heading.get("plan") == heading:
            found |= chunks
    return found


def _remove(folder: Path) -> None:
    """Remove a folder in which others may just begin a file: one that they find gone they do not make."""
    for last in (False,) * _REMOVALS + (True,):
        clear(folder, but=())
        try:
            folder.rmdir()
        except OSError as error:
            if last or error.errno != errno.ENOTEMPTY:
                raise
        else:
            return


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _waits(seconds: float) -> Iterator[float]:
    """Soon at first, so that the disk has work from the start; then every `seconds`."""
    wait = seconds / 8
    while True:
        yield wait
        wait = min(2 * wait, seconds)


class Saved(Protocol):
    """What is to be saved now and then."""

    def save(self) -> None: ...


@contextmanager
def kept_up(buildings: Sequence[Saved], stop: StopFlag, seconds: float = SAVE_SECONDS) -> Iterator[None]:
    """In the block, save every building now and then, `seconds` apart. Where that fails, `stop` is set and
    the error raised.
    """
    ended, waits = threading.Event(), _waits(seconds)
    failures: list[BaseException] = []

    def keep() -> None:
        try:
            while not ended.wait(next(waits)):
                for building in buildings:
                    building.save()
        except BaseException as error:
            failures.append(error)
            stop.set()

    keeper = threading.Thread(target=keep, name="pma-journal", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        try:
            keeper.join()
        except KeyboardInterrupt:
            keeper.join()  # it must not write into files that we are about to close
            raise
        if failures:
            raise failures[0]
