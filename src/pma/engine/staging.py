"""The hidden folder an output is built in, and the rename that makes it real in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
from pathlib import Path

from blake3 import blake3

from pma.engine.journal import JOURNAL_FILE, journals_of_others
from pma.engine.lease import LEASE_FILE
from pma.errors import UsageError
from pma.formats import UNFINISHED_SUFFIX
from pma.formats.files import sync_folder
from pma.remote import RemotePath

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def staging_folder(out: Path) -> Path:
    """Where `out` is built: a hidden sibling, so that the rename stays on one file system."""
    return out.parent / f".{out.name}{UNFINISHED_SUFFIX}"


def built_at(out: Path, staging: Path | None = None) -> Path:
    """Where `out` is built: itself, or for a place in a store a folder in `staging` with a like name."""
    if not isinstance(out, RemotePath):
        return out
    digest = blake3(str(out).encode()).hexdigest()[:12]
    return (staging or private_folder()) / f"{out.name}-{digest}"


def private_folder() -> Path:
    """Where outputs of stores are built if nothing else is said."""
    return Path(tempfile.gettempdir()) / f"pma-{os.getuid()}"


def make_private(folder: Path) -> None:
    """Make the default staging folder, for nobody else: others on this machine can foresee its name."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder} is not a folder of yours alone; choose another place with --staging DIR")


def make_staging_folder(out: Path) -> Path:
    """Make sure there is a folder to build `out` in. Raises UsageError where something else is in the way."""
    refuse_existing(out)
    folder = staging_folder(out)
    _make_folders(out.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(out.parent)
    _refuse_foreign(folder)
    return folder


def _make_folders(folder: Path) -> None:
    """Make `folder` and those above it, each new name durable: or power loss takes what is inside along."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent)


def refuse_existing(out: Path) -> None:
    """Raises UsageError where `out` is there already: PMA never overwrites."""
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already and is not touched; choose another output or remove it first")


def _refuse_foreign(folder: Path) -> None:
    """Only a folder that is empty, or holds a lease of ours and plain files, is ever cleaned or written
    into.
    """
    entries = [] if folder.is_symlink() else list(folder.rglob("*"))
    ours = not entries or any(entry.name.startswith(LEASE_FILE) for entry in folder.iterdir())
    # one who asks for the lease at the same time takes its own file away again
    plain = all(entry.is_dir() or entry.is_file() or not os.path.lexists(entry) for entry in entries)
    if folder.is_symlink() or not ours or not plain or any(entry.is_symlink() for entry in entries):
        raise UsageError(
            f"{folder} is in the way and was not left by a merge; remove it or choose another output"
        )


def clear(folder: Path, *, but: tuple[str, ...] = (LEASE_FILE, JOURNAL_FILE)) -> None:
    """Remove everything in a staging folder except the files in `but`."""
    kept = {folder / name for name in but}
    for entry in sorted(folder.rglob("*"), reverse=True):  # a folder's content comes before it
        if not entry.is_dir():
            if entry not in kept:
                entry.unlink(missing_ok=True)  # whoever made it may be about to remove it, too
        elif not any(entry.iterdir()):
            entry.rmdir()


def leftover_bytes(out: Path) -> int:
    """Bytes that an interrupted merge to `out` left allocated, and that the next one uses or frees."""
    folder = staging_folder(out)
    if folder.is_symlink() or not (folder / LEASE_FILE).is_file():
        return 0
    return sum(_allocated_bytes(entry) for entry in folder.rglob("*"))


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # one who asked for the lease took its own file away again
        return 0


def publish(folder: Path, out: Path) -> None:
    """Give the finished folder its name, for good: everything in it is on the disk before, the name after."""
    sync_folders(folder)
    _rename_without_replacing(folder, out)
    sync_folder(out.parent)
    # only now: without its lease the folder would be free for another process to take until the rename
    for path in (out / JOURNAL_FILE, *journals_of_others(out), out / LEASE_FILE):
        path.unlink(missing_ok=True)
    sync_folder(out)


def sync_folders(folder: Path) -> None:
    """Make the names in a folder and in those below it durable."""
    for inner in folder.rglob("*/"):
        sync_folder(inner)
    sync_folder(folder)


def _rename_without_replacing(folder: Path, out: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = -1
    if hasattr(libc, "renameat2"):
        arguments = (_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(out), _RENAME_NOREPLACE)
        failed = libc.renameat2(*arguments)
    if failed and ctypes.get_errno() == errno.EEXIST:
        refuse_existing(out)
    if failed:
        # not every file system has it; a plain rename replaces at most an empty folder, never data
        refuse_existing(out)
        os.rename(folder, out)
