"""Signals that end us, held back while Ray's own code runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Signals that end us, which do not strike amid Ray's own code: some of it ends the process then."""

    def __init__(self) -> None:
        self._inside = self._came = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if not self._inside:
            raise KeyboardInterrupt
        self._came = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the end of the block."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            if self._came:
                self._came = False
                raise KeyboardInterrupt

    @contextmanager
    def taken(self) -> Iterator[None]:
        """In the block, ours; Ray has put its own in their place."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
