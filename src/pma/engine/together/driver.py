"""The process that holds the lease, makes the folder, shares out the blocks and commits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from pma.engine.journal import Followed, driver_journal, part_journal
from pma.engine.lease import is_gone
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.stream import Digests, Progress
from pma.engine.together.crew import Crew
from pma.engine.together.part import pauses
from pma.engine.together.places import Arrived, Words, driver_at, look_anew, speak
from pma.engine.together.views import view
from pma.engine.together.words import failure_in, said_by, tell_failure
from pma.errors import Interrupted, StorageError
from pma.remote import RemotePath

_TELL_SECONDS = 10.0
# to look at a process's journal takes about a millisecond: a fifth of the time at most
_LOOK_SECONDS = 0.005
_LISTED = 8


class Held(Protocol):
    """What the driver holds: a place for an output, begun or not, in a folder or in a store."""

    @property
    def folder(self) -> Path: ...
    @property
    def token(self) -> str: ...
    def show_life(self) -> None: ...
    def hear(self, digests: Digests, sent: Mapping[str, Arrived]) -> None: ...
    def bytes_of(self, chunks: Iterable[tuple[str, int]]) -> int: ...


class Driver:
    """Speaks to the processes that work on an output, one for each of `names`, and hears of them.

    `progress` hears of bytes that they moved, `tell` of whom is waited for. `who`: what they call us.
    """

    def __init__(
        self,
        plan: Plan,
        names: Sequence[str],
        crew: Crew,
        *,
        progress: Progress | None = None,
        tell: Callable[[str], None] | None = None,
        who: str | None = None,
    ) -> None:
        self._who = who or crew.name
        self._plan, self._names, self._crew = plan, names, crew
        self._progress, self._tell = progress, tell
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._journal: Words | None = None
        self._told = False
        self._called_off: list[str] = []

    def meet(self, building: Held) -> None:
        """Begin to speak in the folder of `building`, and wait until every process said that it sees the same
        plan. Raises what one of them failed with.
        """
        folder, token = building.folder, building.token
        self._building = building
        self.close()
        self._told = False
        self._journal = speak(folder, driver_journal(token))
        told = {"who": self._who, "size": self._crew.size, "files": len(self._plan.layout.files)}
        self._journal.start({**told, "view": view(self._plan)})
        self._workers = [_Worker(n, Followed(folder / part_journal(token, n))) for n in self._names]
        with self.telling():
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        started = told_at = time.monotonic()
        for pause in self._pauses(1.0):
            self._building.show_life()
            self.save()
            missing = [worker.name for worker in self._workers if not worker.journal.said.get("agrees")]
            now = time.monotonic()
            if not missing:
                return
            if now - started > self._crew.join_seconds:
                raise StorageError(
                    f"rank {_listed(missing)} did not come to {self._building.folder} within "
                    f"{now - started:.0f} s: it was not started, or its node does not see that folder. "
                    "Nothing was written"
                )
            if now - told_at > _TELL_SECONDS and self._tell is not None:
                told_at = now
                self._tell(
                    f"waiting for rank {_listed(missing)} of {self._crew.size} (to merge in one process, "
                    "unset RANK and WORLD_SIZE)"
                )
            time.sleep(pause)

    def hand_out(self, parts: Sequence[Part]) -> None:
        """Tell every process its part, the first of which is our own."""
        with self._lock:
            now = time.monotonic()
            for worker in self._workers:
                worker.changed_at = now
        assert self._journal is not None
        self._journal.say(parts=[[[r.start, r.stop] for r in part.ranges] for part in parts])

    def call_off(self, name: str) -> None:
        """Tell the process of that name, which may be at it still, that its part is another's now."""
        assert self._journal is not None
        self._called_off.append(name)
        self._journal.say(called_off=self._called_off)

    def save(self) -> None:
        """Hear what the others did. Raises what one of them failed with, and Interrupted where one shows no
        sign of life.
        """
        with self._lock:
            look_anew(self._building.folder)
            if self._journal is not None:
                self._journal.beat()
            for worker in self._workers:
                self._hear(worker)

    def _hear(self, worker: _Worker) -> None:
        if worker.is_done:
            return
        gone = is_gone((worker.journal.heading or {}).get("process", {}))  # before its last words are heard
        chunks, now = worker.journal.news(), time.monotonic()
        self._building.hear(chunks, worker.journal.said.get("sent", {}))
        if worker.journal.changes != worker.changes:
            worker.changes, worker.changed_at = worker.journal.changes, now
        said = worker.journal.said
        if self._progress is not None and chunks:
            written = self._building.bytes_of(chunks)
            self._progress(said.get("read", 0) - worker.read, written)
            worker.read = said.get("read", 0)
        failed = failure_in(said)
        who = worker.journal.heading["who"] if worker.journal.heading else f"rank {worker.name}"
        if failed is not None:
            raise said_by(who, failed)
        silent = now - worker.changed_at
        if worker.changes and not worker.is_done and (gone or silent > self._crew.silent_seconds):
            what = "the end" if gone else f"no sign for {silent:.0f} s"
            raise Interrupted(f"{what} of {who}; its process or node is gone")

    def record(self, chunks: Digests, sent: Mapping[str, Arrived]) -> None:
        """Say that these chunks were done before, in files that were sent to a store."""
        assert self._journal is not None
        self._journal.add(chunks, sent=dict(sent))

    def await_parts(self, stop: StopFlag) -> None:
        """Return when every part is done, or at once where `stop` is set."""
        # the end of the last part is the end of all: where a look costs no request, look often
        for pause in self._pauses(0.5 if isinstance(self._building.folder, RemotePath) else 0.1):
            self.save()
            if stop.is_set() or all(worker.is_done for worker in self._workers):
                return
            time.sleep(pause)

    def _pauses(self, longest: float) -> Iterator[float]:
        return pauses(longest, shortest=_LOOK_SECONDS * max(len(self._names), 1))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What fails in the block is told to the others, once, so that they stop."""
        try:
            yield
        except BaseException as error:
            if self._journal is not None and not self._told:
                self._told = True
                if self._is_heard():
                    tell_failure(self._journal, error)
            raise

    def _is_heard(self) -> bool:
        """False where another process took over, or all is done: what is said in a store would stay there."""
        folder = self._building.folder
        with suppress(StorageError):
            return (
                not isinstance(folder, RemotePath)
                or driver_at(folder)[0].get("token") == self._building.token
            )
        return False

    def close(self) -> None:
        """Speak no more."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class _Worker:
    """What the driver knows of one process."""

    def __init__(self, name: str, journal: Followed) -> None:
        self.name, self.journal = name, journal
        self.changes = self.read = 0
        self.changed_at = time.monotonic()

    @property
    def is_done(self) -> bool:
        return bool(self.journal.said.get("done"))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def check_all_there(digests: Digests, plan: Plan, out: Path) -> None:
    """Raises StorageError where a chunk is missing."""
    found, expected = len(digests), len(plan.blocks)
    if found != expected:
        raise StorageError(f"{out}: the parts' journals tell of {found} of {expected} chunks")
