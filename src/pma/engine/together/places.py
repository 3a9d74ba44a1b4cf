"""Where the processes that make an output meet: in its hidden folder, or for an output in a store at its own
place there, which has a marker for a lease and objects that are sent anew for journals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pma.engine.journal import Journal, StoreJournal, driver_journal
from pma.engine.lease import holder_of
from pma.engine.provenance import RECORD_FILE
from pma.engine.staging import staging_folder
from pma.engine.stream import Digests
from pma.errors import FormatError, IncompleteError, printable
from pma.formats.contracts import UNFINISHED_FILE
from pma.formats.strict_json import parse_object
from pma.remote import Entry, RemotePath

# what a file in a store was when it arrived: its "stamp", and its "sha256" where that was asked for
Arrived = Mapping[str, str]

_LARGEST_MARKER_BYTES = 2**16


class Words(Protocol):
    """A journal that this process speaks in; see `journal.Journal`."""

    def start(self, heading: Mapping[str, Any]) -> None: ...
    def add(self, digests: Digests, **more: object) -> None: ...
    def say(self, **what: object) -> None: ...
    def beat(self) -> None: ...
    def close(self) -> None: ...


def meeting_folder(out: Path) -> Path:
    """Where processes that make `out` speak."""
    return out if isinstance(out, RemotePath) else staging_folder(out)


def speak(folder: Path, name: str) -> Words:
    """A new journal there. Raises FileExistsError."""
    if isinstance(folder, RemotePath):
        return StoreJournal(folder / name)
    return Journal(folder, name, new=True)


def look_anew(folder: Path) -> None:
    """What others said there is looked for from now on: of a store, listings are remembered for a while."""
    if isinstance(folder, RemotePath):
        folder.store.forget(folder.place)


def driver_at(folder: Path) -> tuple[dict[str, str], int]:
    """What is said of the process that drives there, and what changes as long as it lives."""
    if not isinstance(folder, RemotePath):
        return holder_of(folder)
    look_anew(folder)
    holder = {name: printable(str(value), 80) for name, value in marker_at(folder).items()}
    words = folder.store.listing(folder.place).get(driver_journal(holder.get("token", "")))
    return holder, 0 if words is None else hash((words.size_bytes, words.mtime_ns, words.stamp))


def marker_at(out: RemotePath) -> dict[str, Any]:
    """What the marker of an output in a store says that is not finished; nothing where there is none."""
    marker = out / UNFINISHED_FILE
    for pause in (0.0, 0.05, 0.2, 1.0):
        time.sleep(pause)
        try:
            small = marker.stat().st_size <= _LARGEST_MARKER_BYTES
            return parse_object(marker.read_bytes(), str(marker)) if small else {}
        except FileNotFoundError:
            return {}
        except (FormatError, IncompleteError):  # another was put in its place between listing and reading
            look_anew(out)
    return {}


def is_made(out: Path) -> bool:
    """Whether the output is there, all of it."""
    if not isinstance(out, RemotePath):
        return os.path.lexists(out)
    look_anew(out)
    return RECORD_FILE in out.store.listing(out.place)


def is_begun_or_made(out: RemotePath) -> bool:
    """Whether an output in a store is there, or somebody makes it or will go on with it."""
    look_anew(out)
    return not {UNFINISHED_FILE, RECORD_FILE}.isdisjoint(out.store.listing(out.place))


def stamp_of(entry: Entry) -> str:
    """What tells whether a file in a store is still the one that was sent."""
    return f"{entry.size_bytes} {entry.stamp}"
