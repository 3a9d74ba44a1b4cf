"""Who builds an output: a file with a random token in its hidden folder, held by a lock and kept fresh.

A lock tells of processes under this kernel whether they live: one that was killed has none. It tells nothing
of another host, and names and numbers of hosts and processes are used again in containers; so a lease that
was left by another host or another boot is only ever broken on request, unless its holder wrote into it that
it let go. The same holds on a file system without locks (Lustre is often mounted so), where nobody can tell
whether a holder lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pma.errors import UsageError, printable

LEASE_FILE = ".pma-lease"
_NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.EINVAL)


class Lease:
    """The right to write into `folder`, until `release`. Raises UsageError where somebody else has it."""

    def __init__(self, folder: Path, out: Path, *, break_lock: bool = False) -> None:
        self._path = folder / LEASE_FILE
        self._mine = folder / f"{LEASE_FILE}.{secrets.token_hex(8)}"
        self._out = out
        self._descriptor = -1
        self._holder = {**this_process(), "token": secrets.token_hex(16)}
        try:
            try:
                self._write()
                while not self._placed(break_lock=break_lock):
                    pass
            finally:
                self._mine.unlink(missing_ok=True)
        except BaseException:
            self.release()
            raise

    def _write(self) -> None:
        """Our lease under a name of its own: in place it is never seen half-written."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._mine, flags, 0o644)
        os.write(self._descriptor, json.dumps(self._holder).encode())
        os.fsync(self._descriptor)
        _lock(self._descriptor)

    def _placed(self, *, break_lock: bool) -> bool:
        """Put ours in place. False where another came or went meanwhile."""
        try:
            self._link()
        except FileExistsError:
            pass
        except FileNotFoundError:  # cleared away by one who had the lease just before
            self.release()
            self._write()
            return False
        else:
            return True
        try:
            theirs = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            self._refuse_live(theirs, break_lock=break_lock)
            if not _same(theirs, self._path):
                return False
            os.replace(self._mine, self._path)
            return True
        finally:
            os.close(theirs)

    def _link(self) -> None:
        """Give our lease its name, unless one has it already."""
        try:
            os.link(self._mine, self._path)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            # without hard links one that comes at this very moment is overwritten, and finds out as it beats
            if self._path.exists():
                raise FileExistsError(error.errno, str(error)) from error
            os.rename(self._mine, self._path)

    def _refuse_live(self, theirs: int, *, break_lock: bool) -> None:
        holder = _holder(theirs)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        seconds = max(0, time.time() - os.fstat(theirs).st_mtime)
        locked = _lock(theirs)
        if locked is False:
            raise UsageError(
                f"{self._out} is being written by {who}, last heard of {seconds:.0f} s ago; wait for it"
            )
        ours = (holder.get("host"), holder.get("boot")) == (host(), boot())
        if not (ours and locked) and not break_lock and "released" not in holder:
            why = "a file system without locks" if ours else "another host, or before a restart"
            raise UsageError(
                f"{self._out} is being written, or was left unfinished, by {who} ({why}), last heard of "
                f"{seconds:.0f} s ago. If that process is gone for good, say --break-lock"
            )

    def beat(self) -> None:
        """Show that we live. Raises UsageError where another broke our lease."""
        if not self.is_held():
            raise UsageError(f"another process broke the lease on {self._out}; this one stops")
        self.touch()

    def touch(self) -> None:
        """Show that we live, and do not look whether it is still ours."""
        os.utime(self._descriptor)

    @property
    def token(self) -> str:
        """What tells this lease from any other."""
        return str(self._holder["token"])

    def is_held(self) -> bool:
        """Whether the lease in the folder is still ours."""
        return _same(self._descriptor, self._path)

    def release(self) -> None:
        """Let go, and say so in the file, which stays for its folder to be judged by."""
        if self._descriptor >= 0:
            with suppress(OSError):  # then another host's is refused, as after a kill
                if self.is_held():
                    os.pwrite(self._descriptor, json.dumps({**self._holder, "released": True}).encode(), 0)
            os.close(self._descriptor)
            self._descriptor = -1


def holder_of(folder: Path) -> tuple[dict[str, str], int]:
    """What the lease in a folder says of its holder, and when that was last heard of; nothing where there is
    none.
    """
    try:
        descriptor = os.open(folder / LEASE_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}, 0
    try:
        return _holder(descriptor), os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock the file without waiting: whether that could be done, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return None
    return True


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, str]:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return {k: printable(str(v), 80) for k, v in value.items()} if isinstance(value, dict) else {}


def host() -> str:
    """What this machine is called."""
    return socket.gethostname()


def this_process() -> dict[str, str | int]:
    """What tells this process from any other. `pids`: among which its number is, as those of a container."""
    try:
        pids = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        pids = 0
    return {"host": host(), "boot": boot(), "pids": pids, "pid": os.getpid()}


def is_gone(process: Mapping[str, object]) -> bool:
    """Whether a process, as it told itself, is no more; False where that cannot be known from here."""
    for what, ours in this_process().items():
        if what != "pid" and (not ours or str(process.get(what)) != str(ours)):
            return False
    try:
        os.kill(int(str(process.get("pid"))), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False


def boot() -> str:
    """Which start of this machine's system is running."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
