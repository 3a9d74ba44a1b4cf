"""Carrying out blocks: worker threads with reused buffers, each block read, averaged, digested and written
in one go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from blake3 import blake3

from pma.engine.blocks import CHUNK_BYTES, Block
from pma.engine.plan import Plan
from pma.errors import Interrupted
from pma.formats.contracts import PartWriter

Progress = Callable[[int], None]
Digests = dict[tuple[str, int], str]  # (file, chunk number) -> BLAKE3 of that chunk


def stream(
    plan: Plan, blocks: Sequence[Block], part: PartWriter, progress: Progress | None = None
) -> Digests:
    """Make `blocks` and write them through `part`; the result does not depend on threads or on the blocks'
    order.

    Returns the digest of every chunk written. Raises whatever the first failing block raised, and
    Interrupted.
    """
    from pma.averaging.accumulate import one_torch_thread

    queue = iter(blocks)
    lock, stop = threading.Lock(), threading.Event()
    digests: Digests = {}
    with one_torch_thread(), ThreadPoolExecutor(plan.options.threads) as pool:
        workers = [
            pool.submit(_work, plan, queue, lock, stop, part, digests, progress)
            for _ in range(plan.options.threads)
        ]
        try:
            _wait(workers)
        except KeyboardInterrupt:
            raise Interrupted("interrupted while merging") from None
        finally:
            stop.set()
    return digests


def _wait(workers: Sequence[Future[None]]) -> None:
    done, _ = wait(workers, return_when=FIRST_EXCEPTION)
    for worker in done:
        worker.result()


def _work(
    plan: Plan,
    queue: Iterator[Block],
    lock: threading.Lock,
    stop: threading.Event,
    part: PartWriter,
    digests: Digests,
    progress: Progress | None,
) -> None:
    from pma.averaging.accumulate import one_torch_thread
    from pma.engine.compute import BlockWorker

    with one_torch_thread():  # the setting is the calling thread's own
        worker = BlockWorker(
            plan.readers, plan.weights, allow_nonfinite=plan.options.allow_nonfinite, stop=stop
        )
        while not stop.is_set():
            with lock:
                block = next(queue, None)
            if block is None:
                return
            values = worker.make(block)
            made = chunk_digests(block, values)
            part.write(block.file, block.offset_bytes, values)
            with lock:
                digests.update(made)
            if progress is not None:
                progress(block.length_bytes)


def chunk_digests(block: Block, values: memoryview) -> Digests:
    """BLAKE3 of each 4 MiB chunk of a block; blocks start at chunk boundaries."""
    first = block.offset_bytes // CHUNK_BYTES
    starts = range(0, block.length_bytes, CHUNK_BYTES)
    return {
        (block.file, first + number): blake3(values[start : start + CHUNK_BYTES]).hexdigest()
        for number, start in enumerate(starts)
    }
