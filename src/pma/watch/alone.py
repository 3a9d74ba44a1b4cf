"""One watch a folder: two would write the same page and the same scalars."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pma.errors import UsageError

_LOCK_FILE = ".pma-watch"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made, for the block. Raises UsageError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another pma watch writes into {folder}; stop it, or choose another folder with --out DIR"
            ) from None
        except OSError:
            pass  # a file system without locks: nobody can tell
        yield
    finally:
        os.close(descriptor)
