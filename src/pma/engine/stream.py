"""Carrying out blocks: worker threads with reused buffers, each block read, averaged, digested and written
in one go, for one merge or for several that share their reads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from blake3 import blake3

from pma.engine.blocks import Block
from pma.engine.read_ahead import ReadAhead
from pma.engine.stopping import StopFlag
from pma.engine.work import Work
from pma.errors import Interrupted
from pma.formats.contracts import CheckpointReader, PartWriter

Digests = dict[tuple[str, int], str]  # (file, chunk number) -> BLAKE3 of that chunk
Progress = Callable[[int, int], None]  # (bytes read, bytes written) since the last call


@dataclass(kw_only=True)
class Output:
    """Where one merge goes. A chunk whose digest is there is done; `part` None means digests only."""

    part: PartWriter | None
    digests: Digests = field(default_factory=dict)
    _new: deque[tuple[tuple[str, int], str]] = field(default_factory=deque)

    def done(self, chunk: tuple[str, int], digest: str) -> None:
        """A chunk is written. From any thread."""
        self.digests[chunk] = digest
        self._new.append((chunk, digest))

    def taken(self) -> Digests:
        """What was done since this was called last."""
        return dict(self._new.popleft() for _ in range(len(self._new)))


def stream(
    work: Work,
    outputs: Sequence[Output],
    *,
    numbers: Iterable[int] | None = None,
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> None:
    """Make the blocks `numbers` (all by default) that are not done; the result does not depend on threads or
    order.

    `outputs`: one for each of the work's recipes. Raises whatever the first failing block raised, and
    Interrupted.
    """
    queue = iter(range(len(work.blocks)) if numbers is None else numbers)
    stop = stop or StopFlag()
    forget_what_does_not_fit(work.readers)
    missing = _Missing(work, outputs, queue)
    ahead = ReadAhead(work, iter(missing), missing.recipes, stop)
    in_threads(_Task(work, outputs, missing, ahead, stop, progress).run, work.threads, ahead, stop)


def in_threads(run: Callable[[], None], threads: int, ahead: ReadAhead, stop: StopFlag) -> None:
    """`run` in so many threads, which take their blocks from `ahead`. If one fails, `stop` is set and all
    end. Raises what the first failing one raised, and Interrupted.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        with ahead:
            try:
                ahead.begin()
                _wait([pool.submit(run) for _ in range(threads)])
            finally:
                stop.set()
                _join(pool)
    except KeyboardInterrupt:
        raise Interrupted("interrupted while reading checkpoints") from None


def _join(pool: ThreadPoolExecutor) -> None:
    """Wait for the workers, however often we are interrupted: they write into files that are closed next."""
    try:
        pool.shutdown()
    except KeyboardInterrupt:
        _join(pool)
        raise


def forget_what_does_not_fit(readers: Sequence[CheckpointReader]) -> None:
    """Have sources larger than the memory leave the system's cache as they are read.

    They would not stay there until they are wanted again, and would drive out what others on the node use.
    """
    sizes = {reader.path: sum(file.size_bytes for file in reader.identities()) for reader in readers}
    larger = sum(sizes.values()) > _physical_memory_bytes()
    for reader in readers:
        reader.forget_after_reading = larger


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _wait(workers: Sequence[Future[None]]) -> None:
    done, _ = wait(workers, return_when=FIRST_EXCEPTION)
    for worker in done:
        worker.result()


class _Missing:
    """The blocks that are not done in every output."""

    def __init__(self, work: Work, outputs: Sequence[Output], queue: Iterator[int]) -> None:
        self._work, self._outputs, self._queue = work, outputs, queue

    def recipes(self, block: Block) -> list[int]:
        """Numbers of the recipes that it is still to be made by."""
        return [k for k, output in enumerate(self._outputs) if block.chunk not in output.digests]

    def __iter__(self) -> Iterator[Block]:
        for number in self._queue:
            block = self._work.blocks[number]
            if self.recipes(block):
                yield block


class _Task:
    """What the worker threads share."""

    def __init__(
        self,
        work: Work,
        outputs: Sequence[Output],
        missing: _Missing,
        ahead: ReadAhead,
        stop: StopFlag,
        progress: Progress | None,
    ) -> None:
        self._work, self._outputs, self._missing, self._ahead = work, outputs, missing, ahead
        self._stop, self._progress = stop, progress

    def run(self) -> None:
        """Take blocks until there are none, or `stop` is set."""
        from pma.engine.compute import BlockWorker

        work = self._work
        worker = BlockWorker(
            work.readers,
            work.recipes,
            tile_bytes=work.tile_bytes,
            allow_nonfinite=work.allow_nonfinite,
            stop=self._stop,
            ahead=self._ahead,
        )
        while not self._stop.is_set():
            block = self._ahead.next()
            if block is None:
                return
            wanted = self._missing.recipes(block)
            before = worker.bytes_read
            for k, values in worker.make(block, wanted):
                self._put(self._outputs[k], block, values)
            if self._progress is not None:
                self._progress(worker.bytes_read - before, block.length_bytes * len(wanted))

    def _put(self, output: Output, block: Block, values: memoryview) -> None:
        digest = blake3(values).hexdigest()
        if output.part is not None:
            output.part.write(block.file, block.offset_bytes, values)
        output.done(block.chunk, digest)
