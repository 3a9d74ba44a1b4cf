"""Writing a merge: checks, hidden folder, stream, provenance, rename. Whatever happens before, nothing
looks complete.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from pma.cluster import NodeProgress, OnRay
from pma.engine import provenance
from pma.engine.attempt import attempt
from pma.engine.building import SAVE_SECONDS, kept_up
from pma.engine.plan import Plan
from pma.engine.staging import leftover_bytes, refuse_existing
from pma.engine.stopping import StopFlag
from pma.engine.stream import Progress, stream
from pma.engine.together.crew import Crew
from pma.engine.work import Work, work_of
from pma.errors import SpaceError, UsageError
from pma.formats.hf_trainer import STATE_FILE
from pma.quantities import bytes_text
from pma.remote import RemotePath

# names that trainers take for their own checkpoints and resume from, or delete
_TRAINER_NAME = re.compile(r"checkpoint-\d+|step-?\d+|iter_\d+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge that was written: where, from how many checkpoints, and what it took.

    `bytes_read` is what all merges that were made together read. `bytes_resumed` were there from an earlier
    attempt. `stream_seconds`: reading, averaging, digests and writing; `durable_seconds`: until it was on
    disk. For an output in a store, `bytes_sent` were not there yet.
    """

    path: Path
    checkpoints: int
    scheme: str
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    seconds: float
    stream_seconds: float
    durable_seconds: float
    warnings: tuple[str, ...]
    bytes_sent: int = 0
    send_seconds: float = 0.0


def check_output(plan: Plan, out: Path, *, inside_run: bool = False) -> tuple[str, ...]:
    """Refuse an output that exists, lies inside the run, or finds no room; returns warnings about its
    name.
    """
    refuse_existing(out)
    refuse_inside_run(plan, out, inside_run=inside_run)
    existing = existing_parent(out)
    if not existing.is_dir():
        raise UsageError(f"{out} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{out} cannot be made: {existing} is not writable")
    check_room([(plan, out)])
    return name_warnings(out)


def refuse_inside_run(plan: Plan, out: Path, *, inside_run: bool) -> None:
    """Raises UsageError for an output inside a source, or inside a run unless that is asked for."""
    target = out.resolve()
    for folder in _as_named_and_as_resolved(plan):
        run = folder.parent
        inside_checkpoint = folder == target or folder in target.parents
        if inside_checkpoint or (run in target.parents and not inside_run and _is_run(run)):
            raise UsageError(
                f"{out} lies inside the run {run}, whose trainer may resume from it or delete it; "
                "choose a folder outside" + ("" if inside_checkpoint else ", or say --inside-run")
            )


def name_warnings(out: Path) -> tuple[str, ...]:
    """What may be unwise about an output's name."""
    if _TRAINER_NAME.search(out.name):
        return (
            f"{out.name} is named like a trainer's checkpoint; keep it out of folders that trainers resume "
            "from",
        )
    return ()


def check_room(targets: Sequence[tuple[Plan, Path]]) -> None:
    """Raises SpaceError where the outputs, taken together on each file system, do not fit."""
    needed: dict[int, int] = {}
    for plan, out in targets:
        existing = existing_parent(out)
        device = existing.stat().st_dev
        needed[device] = needed.get(device, 0) + plan.bytes_to_write - leftover_bytes(out)
        free = shutil.disk_usage(existing).free
        if free < needed[device]:
            total = sum(plan.bytes_to_write for plan, _ in targets)
            raise SpaceError(
                f"{existing} has {bytes_text(free)} free, the output needs {bytes_text(total)}; "
                "free some space or choose another place"
            )


def existing_parent(out: Path) -> Path:
    """The nearest folder above `out` that is there already."""
    return next(parent for parent in Path(os.path.realpath(out)).parents if parent.exists())


def _as_named_and_as_resolved(plan: Plan) -> set[Path]:
    """The sources' folders; where one is a symbolic link, both it (its parent made absolute) and where it
    leads.
    """
    paths = [source.point.path for source in plan.sources]
    return {path.parent.resolve() / path.name for path in paths} | {path.resolve() for path in paths}


def _is_run(folder: Path) -> bool:
    inside = [entry for entry in folder.iterdir() if entry.is_dir()]
    return any(_TRAINER_NAME.fullmatch(entry.name) or (entry / STATE_FILE).is_file() for entry in inside)


def is_written(plan: Plan, out: Path) -> bool:
    """Whether `out` is already this very merge: same sources, same recipe, same layout, by its record. In a
    store, also in more files: several processes may have written it.
    """
    if not (out / provenance.RECORD_FILE).is_file():
        return False
    record = provenance.load(out)
    if isinstance(out, RemotePath):
        plan = plan.resharded(len(record["outputs"]))
    return record.get("plan") == provenance.heading(plan)


class How(TypedDict, total=False):
    """How to write a merge; all may be left out.

    `inside_run`: also inside a run. `sha256` adds standard digests of the output, `hash_sources` of the
    sources, both by reading them again. `fresh` forgets an earlier attempt; `break_lock` takes the lease of
    another host's. `progress` hears of bytes moved. `save_seconds`: how often what is done is made durable.
    For an output in a store: `staging` is the folder it is built in, and `sending` hears how many bytes of
    how many are there. `crew`: this process's place among several that write the output together; `tell`
    hears a line of whom they wait for. `ray`: the cluster whose nodes write it, and `show_nodes` hears how
    each does.
    """

    inside_run: bool
    sha256: bool
    hash_sources: bool
    fresh: bool
    break_lock: bool
    progress: Progress | None
    save_seconds: float
    staging: Path | None
    sending: Callable[[int, int], None] | None
    crew: Crew | None
    tell: Callable[[str], None]
    ray: OnRay | None
    show_nodes: Callable[[Sequence[NodeProgress]], None]


def write(plan: Plan, out: Path, **how: Unpack[How]) -> Merge:
    """Carry out `plan` into the new folder `out`; where an earlier attempt was interrupted, go on with it.

    Raises UsageError where `out` exists or another builds it, SpaceError, MismatchError where a source
    changed meanwhile, Interrupted.
    """
    return write_all(work_of(plan), [(plan, out)], **how)[0]


def write_all(work: Work, targets: Sequence[tuple[Plan, Path]], **how: Unpack[How]) -> list[Merge]:
    """As `write`, for several merges that share their reads: `work` has a recipe for each of `targets`."""
    inside_run, fresh = how.get("inside_run", False), how.get("fresh", False)
    break_lock = how.get("break_lock", False)
    warnings = [check_output(plan, out, inside_run=inside_run) for plan, out in targets]
    count, started = Count(how.get("progress")), time.monotonic()
    from pma.engine.compute import load_kernels  # takes a while: a signal amid it may abort the process

    load_kernels(work.blocks.averaged_types())
    with ExitStack() as stack:
        buildings = [
            stack.enter_context(attempt(plan, out, fresh=fresh, break_lock=break_lock))
            for plan, out in targets
        ]
        resumed = [building.bytes_done for building in buildings]
        if any(resumed):
            count.add(0, sum(resumed))
        streaming, stop = time.monotonic(), StopFlag()
        with kept_up(buildings, stop, how.get("save_seconds", SAVE_SECONDS)):
            stream(work, [building.output for building in buildings], progress=count.add, stop=stop)
            streamed = time.monotonic()
        for building in buildings:
            building.save()
        durable = time.monotonic()
        sha256, hash_sources = how.get("sha256", False), how.get("hash_sources", False)
        records = [building.finish(sha256=sha256, hash_sources=hash_sources) for building in buildings]
    return [
        Merge(
            path=out,
            checkpoints=len(plan.sources),
            scheme=record["scheme"],
            bytes_read=count.read,
            bytes_written=plan.bytes_to_write - done,
            bytes_resumed=done,
            seconds=time.monotonic() - started,
            stream_seconds=streamed - streaming,
            durable_seconds=durable - streaming,
            warnings=warning,
        )
        for (plan, out), record, done, warning in zip(targets, records, resumed, warnings, strict=True)
    ]


class Count:
    """Bytes read and written, counted from many threads, and passed on to whoever shows progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.read = self.written = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, read: int, written: int) -> None:
        """Count some more."""
        with self._lock:
            self.read += read
            self.written += written
        if self._progress is not None:
            self._progress(read, written)
