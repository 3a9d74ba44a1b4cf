"""The hidden folder an output is built in, the lease on it, and the rename that makes it real in one step."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pma.errors import UsageError

_LEASE_FILE = ".pma-lease"
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def staging_folder(out: Path) -> Path:
    """Where `out` is built: a hidden sibling, so that the rename stays on one file system."""
    return out.parent / f".{out.name}.pma-partial"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder to build `out` in; renamed to `out` when the block ends well, removed when it fails.

    What a killed process left behind is removed first: its lease is a file lock, which the kernel drops with
    the process. Raises UsageError where `out` exists or another process builds it now.
    """
    refuse_existing(out)
    folder = staging_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lease = _take_lease(folder, out)
    try:
        yield folder
        sync_folder(folder)
        _rename_without_replacing(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        # removed only now: without it the folder would be free for another process to take until the rename
        (out / _LEASE_FILE).unlink()
        sync_folder(out)
        sync_folder(out.parent)
    finally:
        os.close(lease)


def refuse_existing(out: Path) -> None:
    """Raises UsageError where `out` is there already: PMA never overwrites."""
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already and is not touched; choose another output or remove it first")


def _take_lease(folder: Path, out: Path) -> int:
    """Create `folder` and lock its lease file; returns the descriptor that holds the lock."""
    path = folder / _LEASE_FILE
    while True:
        folder.mkdir(exist_ok=True)
        _refuse_foreign(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        holder = _holder(path)
        # a lock does not reach across hosts on every file system, so another host's lease is never broken
        if not locked or holder.get("host", _host()) != _host():
            os.close(descriptor)
            raise UsageError(
                f"{out} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}; "
                "wait for "
                f"it. If that process is gone for good, remove {folder}"
            )
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            break
        os.close(descriptor)  # its holder finished and took the folder away between our open and our lock
    for entry in folder.iterdir():
        if entry.name != _LEASE_FILE:
            entry.unlink()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": _host()}).encode(), 0)
    return descriptor


def _refuse_foreign(folder: Path) -> None:
    """Only a folder that is empty, or holds a lease of ours and plain files, is ever cleaned or written
    into.
    """
    entries = [] if folder.is_symlink() else list(os.scandir(folder))
    ours = not entries or any(entry.name == _LEASE_FILE for entry in entries)
    if folder.is_symlink() or not ours or not all(entry.is_file(follow_symlinks=False) for entry in entries):
        raise UsageError(
            f"{folder} is in the way and was not left by a merge; remove it or choose another output"
        )


def leftover_bytes(out: Path) -> int:
    """Bytes that an interrupted merge to `out` left allocated, and that the next one frees first."""
    folder = staging_folder(out)
    if folder.is_symlink() or not (folder / _LEASE_FILE).is_file():
        return 0
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir())


def _holder(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _host() -> str:
    return socket.gethostname()


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
