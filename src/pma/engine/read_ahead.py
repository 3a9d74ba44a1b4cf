"""Reading ahead from stores: what coming blocks need is asked for in large requests, many at once, within a
budget of bytes, while blocks before them are averaged.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.engine.blocks import Block, Policy
from pma.engine.memory_budget import IN_FLIGHT, READ_AHEAD_BYTES
from pma.engine.segments import Segments
from pma.engine.stopping import StopFlag
from pma.engine.work import Work
from pma.errors import Interrupted
from pma.formats.contracts import CheckpointReader

_LARGEST_WINDOW_BYTES = 4 * 2**20
# enough to keep every request busy where blocks are small
_MOST_BLOCKS = 4 * IN_FLIGHT
_LOOK_SECONDS = 0.2  # how often one that waits for bytes looks whether the work was called off

Place = tuple[tuple[str, int], int, int, int]  # chunk, number of the span, of the reader, first byte


@dataclass(frozen=True)
class _Window:
    """Bytes `start` to `stop` of a span in one source. `turn`: windows get room in the order of use."""

    reader: CheckpointReader
    segments: Segments
    start: int
    stop: int
    turn: int


class ReadAhead:
    """Hands out blocks in order; `take` gives what was read ahead for them.

    `needed`: the recipes of a block that are still to be made. Use it in a `with` block.
    """

    def __init__(
        self, work: Work, blocks: Iterator[Block], needed: Callable[[Block], Sequence[int]], stop: StopFlag
    ) -> None:
        self._work, self._blocks, self._needed, self._stop = work, blocks, needed, stop
        self._remote = {number for number, reader in enumerate(work.readers) if reader.is_remote}
        self._window_bytes = _window_bytes(work.tile_bytes, len(self._remote))
        self._coming: deque[Block] = deque()
        self._windows: dict[Place, Future[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()
        self._room = threading.Condition()
        self._used_bytes = self._turn = self._turns = 0
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pma-ahead") if self._remote else None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_waiting()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self) -> None:
        """Read, while whoever takes the blocks still gets ready."""
        with self._lock:
            self._ask_for_more()

    def next(self) -> Block | None:
        """The next block, its bytes and those of blocks after it on their way; None after the last."""
        with self._lock:
            self._ask_for_more()
            return self._coming.popleft() if self._coming else None

    def _ask_for_more(self) -> None:
        while len(self._coming) < (_MOST_BLOCKS if self._is_hungry() else 1):
            block = next(self._blocks, None)
            if block is None:
                break
            self._coming.append(block)
            self._ask_for(block)

    def _is_hungry(self) -> bool:
        """Whether fewer windows are waited for than can be had at once."""
        return self._pool is not None and self._turns - self._turn < 2 * IN_FLIGHT

    def _ask_for(self, block: Block) -> None:
        if self._pool is None:
            return
        recipes = [self._work.recipes[k] for k in self._needed(block)]
        averaged = sorted({number for recipe in recipes for number, _ in recipe.members} & self._remote)
        copied = sorted({recipe.newest for recipe in recipes} & self._remote)
        for index, span in enumerate(block.spans):
            if span.policy is Policy.ZERO:
                continue
            numbers, segments = (averaged if span.policy is Policy.AVERAGE else copied), Segments(span)
            for start in range(0, span.length_in_bytes, self._window_bytes):
                stop = min(start + self._window_bytes, span.length_in_bytes)
                for number in numbers:
                    window = _Window(self._work.readers[number], segments, start, stop, self._turns)
                    self._turns += 1
                    self._windows[block.chunk, index, number, start] = self._pool.submit(self._read, window)

    def _read(self, window: _Window) -> NDArray[np.uint8]:
        length = window.stop - window.start
        self._wait_for_room(window.turn, length)
        buffer = np.empty(length, np.uint8)
        view = memoryview(buffer)  # type: ignore[arg-type]  # numpy's stubs for 3.11 do not say it is a buffer
        window.reader.read_many(window.segments.requests(window.reader, window.start, window.stop, view))
        return buffer

    def _wait_for_room(self, turn: int, length_bytes: int) -> None:
        """In the order of use: were a later window let in first, all room could be held by windows that
        nobody takes before an earlier one.
        """
        with self._room:
            while turn != self._turn or (
                self._used_bytes and self._used_bytes + length_bytes > READ_AHEAD_BYTES
            ):
                if self._stop.is_set():
                    raise Interrupted("stopped")
                self._room.wait(_LOOK_SECONDS)
            self._turn += 1
            self._used_bytes += length_bytes
            self._room.notify_all()

    def _stop_waiting(self) -> None:
        with self._room:
            self._stop.set()
            self._room.notify_all()

    def take(self, block: Block, index: int, number: int, start: int, into: NDArray[Any]) -> bool:
        """Fill `into` with a source's bytes of span `index` from byte `start` on, each taken once and in
        order. False where they were not read ahead.
        """
        stop = start + len(into)
        while start < stop:
            first = start // self._window_bytes * self._window_bytes
            place = block.chunk, index, number, first
            window = self._windows.get(place)
            if window is None:
                return False
            buffer = self._waited_for(window)
            part = buffer[start - first : stop - first]
            into[len(into) - (stop - start) :][: len(part)] = part
            start += len(part)
            if start == first + len(buffer):
                del self._windows[place]
                with self._room:
                    self._used_bytes -= len(buffer)
                    self._room.notify_all()
        return True

    def _waited_for(self, window: Future[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        while not self._stop.is_set():
            if wait([window], _LOOK_SECONDS).done:
                return window.result()
        raise Interrupted("stopped")


def _window_bytes(tile_bytes: int, sources: int) -> int:
    """As large as one request, but so small that a window of every source, twice, fits into the budget."""
    window_bytes = _LARGEST_WINDOW_BYTES
    while window_bytes > tile_bytes and 2 * sources * window_bytes > READ_AHEAD_BYTES:
        window_bytes //= 2
    return window_bytes
