"""Outputs in stores: built on this machine as any other output, then sent there, `pma.json` last.

What an interrupted attempt left is told by a marker file, which names the merge; a reader takes a checkpoint
with the marker and without `pma.json` for unfinished.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from pma.engine import commit, provenance
from pma.engine.building import SAVE_SECONDS, kept_up
from pma.engine.commit import How, Merge, check_room, is_written
from pma.engine.journal import JOURNAL_FILE, Journal
from pma.engine.lease import LEASE_FILE, Lease, host
from pma.engine.plan import Plan
from pma.engine.staging import built_at, make_private, private_folder
from pma.engine.stopping import StopFlag
from pma.engine.together.hands import remove_left_over
from pma.engine.together.in_store import StoreAttempt, as_begun, refuse_in_store, refuse_live, remove_words
from pma.engine.together.places import stamp_of
from pma.engine.work import shared_work
from pma.errors import IncompleteError, Interrupted, StorageError, UsageError
from pma.quantities import bytes_text
from pma.remote import Entry, RemotePath

# files that are sent at once; the driver sends parts of a large one at once, too
_AT_ONCE = 4


def check_output(
    plan: Plan,
    out: Path,
    *,
    inside_run: bool = False,
    staging: Path | None = None,
    fresh: bool = False,
    on_nodes: bool = False,
) -> tuple[str, ...]:
    """As `commit.check_output`, also for an output in a store; `on_nodes`: which is not built here, but on
    each node a share of it.
    """
    if not isinstance(out, RemotePath):
        return commit.check_output(plan, out, inside_run=inside_run)
    refuse_in_store(as_begun(plan, out, fresh=fresh), out, fresh=fresh)
    commit.refuse_inside_run(plan, out, inside_run=inside_run)
    local = built_at(out, staging)
    if not on_nodes and not os.path.lexists(local):
        commit.check_output(plan, local, inside_run=inside_run)
    return commit.name_warnings(out)


def write(plan: Plan, out: Path, **how: Unpack[How]) -> Merge:
    """As `commit.write`, also to a store: then it is built in `staging` first. An interrupted attempt goes
    on, be it at building or at sending. With a `crew`, see `together.write`.
    """
    # what only several processes need is imported by them: 20 ms of every command
    if (on := how.get("ray")) is not None:
        from pma.engine.on_ray import writing as on_ray

        return on_ray.write(plan, out, on, **how)
    if how.get("crew") is not None:
        from pma.engine.together import writing as together

        return together.write(plan, out, **how)
    begun = as_begun(plan, out, fresh=how.get("fresh", False)) if isinstance(out, RemotePath) else plan
    return write_all([(begun, out)], **how)[0]


def write_all(targets: Sequence[tuple[Plan, Path]], **how: Unpack[How]) -> list[Merge]:
    """As `write`, for several merges that share their reads."""
    fresh, staging = how.get("fresh", False), how.get("staging")
    for plan, out in targets:
        check_output(plan, out, inside_run=how.get("inside_run", False), staging=staging, fresh=fresh)
        if isinstance(out, RemotePath) and not how.get("break_lock", False):
            refuse_live(out)
    places = [(plan, built_at(out, staging)) for plan, out in targets]
    if staging is None and any(isinstance(out, RemotePath) for _, out in targets):
        make_private(private_folder())
    for (plan, local), (_, out) in zip(places, targets, strict=True):
        if isinstance(out, RemotePath):
            _forget_another(plan, local, out, fresh=fresh)
    missing = [
        (plan, local)
        for (plan, local), (_, out) in zip(places, targets, strict=True)
        if local is out or not _is_built(plan, local)
    ]
    check_room(missing)
    made = commit.write_all(shared_work([p for p, _ in missing]), missing, **how) if missing else []
    built = {merge.path: merge for merge in made}
    merges = [built.get(local) or _found(plan, local) for plan, local in places]
    return [
        _delivered(plan, merge, out, how) if isinstance(out, RemotePath) else merge
        for merge, (plan, out) in zip(merges, targets, strict=True)
    ]


def _is_built(plan: Plan, local: Path) -> bool:
    return local.is_dir() and is_written(plan, local)


def _forget_another(plan: Plan, local: Path, out: RemotePath, *, fresh: bool) -> None:
    """Remove what was built before and never sent, on request; refuse it where it is another merge."""
    if not os.path.lexists(local) or (_is_built(plan, local) and not fresh):
        return
    if not fresh:
        raise UsageError(
            f"an earlier merge to {out} was built in {local} and not sent, and its sources or options were "
            "not the same; repeat that command to go on, or say --fresh to start over"
        )
    lease = Lease(local, out)
    shutil.rmtree(local)
    lease.release()


def _found(plan: Plan, local: Path) -> Merge:
    """A merge that an earlier attempt built."""
    return Merge(
        path=local,
        checkpoints=len(plan.sources),
        scheme=str(provenance.load(local)["scheme"]),
        bytes_read=0,
        bytes_written=0,
        bytes_resumed=plan.bytes_to_write,
        seconds=0.0,
        stream_seconds=0.0,
        durable_seconds=0.0,
        warnings=(),
    )


def _delivered(plan: Plan, merge: Merge, out: RemotePath, how: How) -> Merge:
    """Send what was built, and remove it here. Returns the merge where it is now."""
    started, local = time.monotonic(), merge.path
    lease = Lease(local, out, break_lock=how.get("break_lock", False))
    try:
        sending = _Sending(plan, local, out)
        with _goes_on(sending):
            sending.run(how)
        shutil.rmtree(local, ignore_errors=True)
        remove_left_over(out, how.get("staging"))  # several processes may have begun it
    finally:
        lease.release()
    seconds = time.monotonic() - started
    return replace(
        merge,
        path=out,
        warnings=commit.name_warnings(out),
        seconds=merge.seconds + seconds,
        bytes_sent=sending.bytes_sent,
        send_seconds=seconds,
    )


@contextmanager
def _goes_on(sending: _Sending) -> Iterator[None]:
    """Say after a failure that what was built and sent is kept."""
    kept = (
        "{error}. {out} is built in {local}, {sent} of {total} is sent: the same command goes on, "
        "with --fresh it starts over"
    )

    def explained(error: object) -> str:
        sent, total = bytes_text(sending.bytes_there), bytes_text(sending.bytes_total)
        return kept.format(error=error, out=sending.out, local=sending.local, sent=sent, total=total)

    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(explained("interrupted while sending")) from None
    except (StorageError, IncompleteError) as error:
        raise type(error)(explained(error)) from error
    except OSError as error:
        raise StorageError(explained(error)) from error


class _Sending:
    """One output on its way to a store. What has arrived is journaled, and not sent again."""

    def __init__(self, plan: Plan, local: Path, out: RemotePath) -> None:
        self.plan, self.local, self.out = plan, local, out
        self._heading = {"sent_to": str(out), "plan": provenance.heading(plan)}
        files = {path.relative_to(local).as_posix(): path for path in local.rglob("*") if path.is_file()}
        ours = [name for name in files if name.startswith(LEASE_FILE) or name == JOURNAL_FILE]
        self._sizes = {name: path.stat().st_size for name, path in files.items() if name not in ours}
        self._records = [name for name in plan.layout.records if name in self._sizes]
        self.bytes_total = sum(self._sizes.values())
        self.bytes_sent = self.bytes_there = 0

    def run(self, how: How) -> None:
        """Weights and side files at once, then what completes them, `pma.json` last."""
        tell = how.get("sending")
        with closing(Journal(self.local)) as journal, self._held(how) as held:
            if journal.heading != self._heading:
                journal.start(self._heading)
            there = {name for name in self._sizes if name in held.sent or self._is_there(name, journal)}
            missing = [name for name in self._sizes if name not in there]
            self.bytes_there = self.bytes_total - sum(self._sizes[name] for name in missing)
            last = [*self._records, provenance.RECORD_FILE]
            first = sorted(set(missing) - set(last), key=lambda name: -self._sizes[name])
            for name, entry in self._at_once(first):
                self._arrived(name, entry, journal)
                if tell is not None:
                    tell(self.bytes_there, self.bytes_total)
            held.save()
            for name in last:
                if name in missing:
                    self._arrived(name, self._send(name), journal)

    @contextmanager
    def _held(self, how: How) -> Iterator[StoreAttempt]:
        """The output's place, for the block: whoever else would make the same output sees that we live."""
        # what speaks to others is imported by those who send: 20 ms of every command
        from pma.engine.together.crew import Crew
        from pma.engine.together.driver import Driver

        held = StoreAttempt(self.plan, self.out, break_lock=how.get("break_lock", False))
        driver = Driver(self.plan, [], Crew(rank=0, size=1), who=f"process {os.getpid()} on {host()}")
        try:
            with closing(driver), driver.telling():
                driver.meet(held)
                held.begin(fresh=how.get("fresh", False))
                with kept_up([held, driver], StopFlag(), how.get("save_seconds", SAVE_SECONDS)):
                    yield held
            remove_words(self.out)
        finally:
            held.release()

    def _is_there(self, name: str, journal: Journal) -> bool:
        """Whether what we sent earlier is still what lies there: the same size, the same etag."""
        sent = journal.digests.get((name, self._sizes[name]))
        folder, _, last = name.rpartition("/")
        found = self.out.store.listing((self.out / folder if folder else self.out).place).get(last)
        return sent is not None and found is not None and sent == stamp_of(found)

    def _at_once(self, names: Sequence[str]) -> Iterator[tuple[str, Entry]]:
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pma-send")
        try:
            sends = {pool.submit(self._send, name): name for name in names}
            pending, failed = set(sends), None
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for sent in done:
                    if (error := sent.exception()) is None:
                        yield sends[sent], sent.result()
                        continue
                    failed = failed or error
                    # what is underway still arrives, and is not sent again; nothing arrives after we raise
                    pending = {other for other in pending if not other.cancel()}
            if failed is not None:
                raise failed
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, name: str) -> Entry:
        return self.out.store.send(self.local / name, (self.out / name).place)

    def _arrived(self, name: str, entry: Entry, journal: Journal) -> None:
        journal.add({(name, self._sizes[name]): stamp_of(entry)})
        self.bytes_sent += self._sizes[name]
        self.bytes_there += self._sizes[name]
