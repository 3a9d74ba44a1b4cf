"""How fast this storage can be: plain reads of the same ranges and plain writes, without any arithmetic."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pma.engine.blocks import Block, Policy
from pma.engine.commit import existing_parent
from pma.engine.plan import Plan
from pma.engine.segments import Segments
from pma.engine.work import Work, work_of

_SAMPLE_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a sample took, and what the whole would take at that rate."""

    sample_bytes: int
    sample_seconds: float
    seconds: float


def measure_roofline(plan: Plan, out: Path, *, sample_bytes: int = _SAMPLE_BYTES) -> Roofline:
    """Read blocks spread evenly over the work, about `sample_bytes`, and write what they make, near `out`.

    The same requests, by as many threads, as streaming makes; nothing is averaged, digested or synced. What
    it reads is in the system's cache afterwards, so the sample is kept small beside a large merge.
    """
    work, near = work_of(plan), existing_parent(out)
    numbers = _spread(work, sample_bytes)
    moved = [_bytes_moved(work, number) for number in numbers]
    with tempfile.TemporaryFile(dir=near) as scratch:
        started = time.perf_counter()
        with ThreadPoolExecutor(work.threads) as pool:
            mine = [numbers[worker :: work.threads] for worker in range(work.threads)]
            list(pool.map(lambda share: _move(work, share, scratch.fileno()), mine))
        seconds = time.perf_counter() - started
    scale = len(work.blocks) / max(len(numbers), 1)
    return Roofline(sample_bytes=sum(moved), sample_seconds=seconds, seconds=seconds * scale)


def _spread(work: Work, sample_bytes: int) -> list[int]:
    total = len(work.blocks)
    each = max((_bytes_moved(work, number) for number in {0, total // 2}), default=1) if total else 1
    count = min(total, max(work.threads, sample_bytes // max(each, 1)))
    return [i * total // count for i in range(count)]


def _bytes_moved(work: Work, number: int) -> int:
    block = work.blocks[number]
    written = block.length_bytes * len(work.recipes)
    return written + sum(
        span.element_count * span.dtype_in.bits // 8 * _sources(work, span.policy) for span in block.spans
    )


def _sources(work: Work, policy: Policy) -> int:
    return len(work.readers) if policy is Policy.AVERAGE else 1


def _move(work: Work, numbers: Sequence[int], scratch: int) -> None:
    # begins where a page does, as the buffers of the merge do
    buffer = memoryview(mmap.mmap(-1, work.tile_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    for number in numbers:
        block = work.blocks[number]
        _read(work, block, buffer)
        for _ in work.recipes:
            for start in range(0, block.length_bytes, len(buffer)):
                os.pwrite(scratch, buffer[: block.length_bytes - start], number * block.length_bytes + start)


def _read(work: Work, block: Block, buffer: memoryview) -> None:
    for span in block.spans:
        segments = Segments(span)
        length = span.element_count * span.dtype_in.bits // 8
        readers = work.readers if span.policy is Policy.AVERAGE else work.readers[-1:]
        for start in range(0, length, len(buffer)):
            stop = min(start + len(buffer), length)
            for reader in readers:
                reader.read_many(segments.requests(reader, start, stop, buffer))
