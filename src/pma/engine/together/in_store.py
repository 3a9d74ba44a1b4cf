"""An output in a store that several processes make: who drives is told by its marker, and what is there by
journals beside it. Each file is made and sent by one process; what completes them is sent by the driver.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from pma.engine import provenance
from pma.engine.attempt import errors_of_ours
from pma.engine.blocks import CHUNK_BYTES
from pma.engine.commit import is_written
from pma.engine.journal import Followed, journals_of_others
from pma.engine.lease import is_gone, this_process
from pma.engine.plan import Plan
from pma.engine.stream import Digests
from pma.engine.together.places import Arrived, driver_at, look_anew, marker_at, stamp_of
from pma.errors import (
    IncompleteError,
    Interrupted,
    MismatchError,
    NonfiniteError,
    StorageError,
    UsageError,
)
from pma.formats.contracts import UNFINISHED_FILE
from pma.remote import RemotePath

# a driver that lives shows it every five seconds
_WATCH_SECONDS = 15.0


class StoreAttempt:
    """An attempt at an output in a store, held by its marker from `__init__` to `close`.

    Nothing but the marker is changed before `begin`. `digests`: chunks that are there; `sent`: files that
    are, and what they were when they arrived. Raises UsageError where somebody else makes the output.
    """

    def __init__(self, plan: Plan, out: RemotePath, *, break_lock: bool = False) -> None:
        self.plan, self.out, self.folder = plan, out, out
        self.token = secrets.token_hex(16)
        self.digests: Digests = {}
        self.sent: dict[str, Arrived] = {}
        if not break_lock:
            refuse_live(out)
        self._earlier = marker_at(out)
        # until `begin`, what is there is still the earlier attempt's
        self._mark(plan=self._earlier.get("plan"), files=self._earlier.get("files", self._files))

    @property
    def _files(self) -> int:
        return len(self.plan.layout.files)

    def _mark(self, *, plan: object, files: object) -> None:
        self._put(
            {"sent_to": str(self.out), **this_process(), "token": self.token, "plan": plan, "files": files}
        )

    def _put(self, value: Mapping[str, object]) -> None:
        marker = self.out / UNFINISHED_FILE
        marker.store.send_bytes(json.dumps(value).encode(), marker.place)
        look_anew(self.out)

    def begin(self, *, fresh: bool = False) -> None:
        """Take over what earlier attempts at the same merge sent, as far as it is there still; where `fresh`,
        remove it.
        """
        look_anew(self.out)
        ours = {path.name for path in journals_of_others(self.out, self.token)}
        others = [path for path in journals_of_others(self.out) if path.name not in ours]
        heading = provenance.heading(self.plan)
        for path in () if fresh else others:
            journal = Followed(path)
            chunks = journal.news()
            told = journal.heading or {}
            if heading in (told.get("plan"), told.get("view", {}).get("plan")):
                self.hear(chunks, journal.said.get("sent", {}))
        self.sent = {name: arrived for name, arrived in self.sent.items() if self._is_there(name)}
        self.digests = {chunk: digest for chunk, digest in self.digests.items() if chunk[0] in self.sent}
        if fresh:  # in other files perhaps than ours will be, beside which nobody could read ours
            _remove_all(self.out, but={UNFINISHED_FILE, *ours})
        self._mark(plan=heading, files=self._files)
        self._left_over = others

    def forget_others(self) -> None:
        """Remove the journals of earlier attempts, after what they tell was said again."""
        for path in self._left_over:
            self.out.store.remove(path.place)

    def _is_there(self, name: str) -> bool:
        """Whether a file is still what was sent."""
        folder, _, last = name.rpartition("/")
        place = (self.out / folder if folder else self.out).place
        found = self.out.store.listing(place).get(last)
        return found is not None and stamp_of(found) == self.sent[name]["stamp"]

    @property
    def bytes_done(self) -> int:
        """Bytes of the files that are there, as far as this process knows."""
        return self.bytes_of(self.digests)

    def bytes_of(self, chunks: Iterable[tuple[str, int]]) -> int:
        """Bytes of some chunks of the output."""
        sizes = {file.name: file.size_bytes for file in self.plan.layout.files}
        return sum(min(CHUNK_BYTES, sizes[file] - number * CHUNK_BYTES) for file, number in chunks)

    def hear(self, digests: Digests, sent: Mapping[str, Arrived]) -> None:
        """Some process sent these files."""
        self.digests |= digests
        self.sent |= sent

    def show_life(self) -> None:
        """The driver's journal does."""

    def save(self) -> None:
        """See that the marker is still ours. Raises UsageError."""
        if driver_at(self.out)[0].get("token") != self.token:
            raise UsageError(f"another process took over {self.out}; this one stops")

    def complete(self, *, sha256: bool = False, hash_sources: bool = False) -> None:
        """Every file is there: send what belongs beside them, but for the record. `sha256`: where those who
        sent the files did not take them, they are read again.
        """
        plan = self.plan
        provenance.check_unchanged(plan)
        self.save()
        for file in plan.layout.files:
            if not self._is_there(file.name):
                raise StorageError(
                    f"{self.out / file.name} was changed after it was sent, by another process"
                )
        beside = plan.options.like or plan.sources[-1].point.folder
        origins = {name: str((beside / name).resolve()) for name in plan.side_files}
        self._record = provenance.record(
            plan, self.digests, origins, sha256_of=self._sha256_of if sha256 else None
        )
        if hash_sources:
            provenance.add_source_digests(self._record)
        for name, data in {**plan.side_files, **plan.layout.records}.items():
            self.out.store.send_bytes(data, (self.out / name).place)

    def _sha256_of(self, name: str) -> str:
        return self.sent[name].get("sha256") or provenance.sha256(self.out, name)

    def finish(self) -> None:
        """Send the record, which completes the output, and remove what led there. Nobody speaks any more."""
        record = self.out / provenance.RECORD_FILE
        self.out.store.send_bytes(provenance.encode(self._record), record.place)
        remove_words(self.out)

    def discard(self) -> None:
        """Remove everything, unless another took over: no later attempt could use it."""
        if driver_at(self.out)[0].get("token") != self.token:
            return
        there = self.out.store.listing(self.out.place)
        for file in self.plan.layout.files:
            if "/" in file.name or file.name in there:
                self.out.store.remove((self.out / file.name).place)
        remove_words(self.out)

    def give_up_before(self) -> None:
        """Nothing was begun: leave the place as it was."""
        if driver_at(self.out)[0].get("token") != self.token:
            return
        if self._earlier:
            self._put({**self._earlier, "released": True})
        else:
            remove_words(self.out)

    def release(self) -> None:
        """Let go, so that the next attempt need not look whether we live, if that can still be said."""
        with suppress(StorageError):
            marker = marker_at(self.out)
            if marker.get("token") == self.token:
                self._put({**marker, "released": True})


def remove_words(out: RemotePath) -> None:
    """Remove what led to an output: journals, and the marker last."""
    look_anew(out)
    for path in (*journals_of_others(out), out / UNFINISHED_FILE):
        out.store.remove(path.place)
    look_anew(out)


def _remove_all(folder: RemotePath, *, but: Container[str] = ()) -> None:
    for name, entry in folder.store.listing(folder.place).items():
        if entry.is_folder:
            _remove_all(folder / name)
        elif name not in but:
            folder.store.remove((folder / name).place)
    look_anew(folder)


@contextmanager
def store_attempt(
    plan: Plan,
    out: RemotePath,
    *,
    fresh: bool = False,
    break_lock: bool = False,
    agree: Callable[[StoreAttempt], None],
) -> Iterator[StoreAttempt]:
    """An attempt at an output in a store, begun. After a failure, keep what a later attempt can go on with,
    and say so; remove anything else.

    `agree` is called while nothing is changed yet but for the marker; where it raises, nothing will be.
    """
    held = StoreAttempt(plan, out, break_lock=break_lock)
    with errors_of_ours(out):
        try:
            agree(held)
        except BaseException:
            held.give_up_before()
            raise
    try:
        with errors_of_ours(out):
            held.begin(fresh=fresh)
            yield held
    except (MismatchError, NonfiniteError):
        held.discard()
        raise
    except (Interrupted, StorageError, IncompleteError) as error:
        held.release()
        share = 100 * held.bytes_done // max(plan.bytes_to_write, 1)
        raise type(error)(
            f"{error}. About {share}% of {out} is sent: the same command goes on, with --fresh it starts over"
        ) from error
    except BaseException:
        held.release()
        raise


def refuse_in_store(plan: Plan, out: RemotePath, *, fresh: bool) -> None:
    """Raises UsageError where `out` holds anything but what an interrupted attempt at this merge left."""
    look_anew(out)
    inside = {path.name for path in out.iterdir()}
    if not inside and not out.is_file():
        return
    # with both it is finished, and whoever finished it was killed before the marker went
    if UNFINISHED_FILE not in inside or (provenance.RECORD_FILE in inside and not is_written(plan, out)):
        raise UsageError(f"{out} exists already and is not touched; choose another output or remove it first")
    earlier = marker_at(out).get("plan")
    if earlier not in (None, provenance.heading(plan)) and not fresh:
        raise UsageError(
            f"an earlier merge to {out} was interrupted while it was sent, and its sources or options were "
            "not the same; repeat that command to go on, or say --fresh to start over"
        )


def as_begun(plan: Plan, out: RemotePath, *, fresh: bool) -> Plan:
    """`plan` in as many files as an interrupted attempt at `out` began."""
    files = 0 if fresh else marker_at(out).get("files", 0)
    return plan.resharded(files) if type(files) is int else plan


def refuse_live(out: RemotePath) -> None:
    """Watch whether a process that makes the output in a store shows that it lives. Raises UsageError."""
    holder, beat = driver_at(out)
    deadline = time.monotonic() + _WATCH_SECONDS
    while "token" in holder and "released" not in holder and not is_gone(holder):
        if time.monotonic() > deadline:
            return
        time.sleep(0.5)
        now, later = driver_at(out)
        if now == holder and later != beat:
            raise UsageError(
                f"{out} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}; "
                "wait for it"
            )
        holder = now
