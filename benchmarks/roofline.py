"""The roofline: plain positional reads of the sources and writes of as many bytes as the output has.

Threads take blocks of the output in turn, as the merge's do; for each, the same range of every source is read
into one reused buffer, and the block is written from it. Nothing is computed.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

REQUEST_BYTES = 2**19  # what the merge asks of the system in one call
BLOCK_BYTES = 4 * 2**20  # what a thread of the merge takes at once
_WEIGHTS = (".safetensors", ".distcp", ".bin")


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors."""
    return sorted(file for file in checkpoint.iterdir() if file.suffix in _WEIGHTS)


def roofline(checkpoints: list[Path], out: Path, threads: int) -> dict[str, float]:
    """Seconds to read every source and write an output: the stream alone, and with its final sync."""
    shapes = [(file.name, file.stat().st_size) for file in weight_files(checkpoints[0])]
    out.mkdir()
    with ExitStack() as opened:

        def descriptor(path: Path, flags: int) -> int:
            number = os.open(path, flags, 0o644)
            opened.callback(os.close, number)
            return number

        sources = {name: [descriptor(path / name, os.O_RDONLY) for path in checkpoints] for name, _ in shapes}
        outputs = {name: descriptor(out / name, os.O_RDWR | os.O_CREAT | os.O_EXCL) for name, _ in shapes}
        for name, file_bytes in shapes:
            os.posix_fallocate(outputs[name], 0, file_bytes)
        blocks = (
            (name, start, min(start + BLOCK_BYTES, file_bytes))
            for name, file_bytes in shapes
            for start in range(0, file_bytes, BLOCK_BYTES)
        )
        started = time.perf_counter()
        _stream(blocks, sources, outputs, threads)
        streamed = time.perf_counter()
        for output in outputs.values():
            os.fdatasync(output)
        return {"stream_seconds": streamed - started, "durable_seconds": time.perf_counter() - started}


def _stream(
    blocks: Iterator[tuple[str, int, int]],
    sources: dict[str, list[int]],
    outputs: dict[str, int],
    threads: int,
) -> None:
    lock = threading.Lock()

    def work() -> None:
        # begins where a page does: into a bytearray, 16 bytes later, the system copies at half the speed
        buffer = memoryview(mmap.mmap(-1, REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            name, block_start, block_stop = block
            for source in sources[name]:
                for start in range(block_start, block_stop, REQUEST_BYTES):
                    wanted = min(REQUEST_BYTES, block_stop - start)
                    if os.preadv(source, [buffer[:wanted]], start) != wanted:
                        raise OSError(f"short read of {name} at {start}")
            for start in range(block_start, block_stop, REQUEST_BYTES):
                wanted = min(REQUEST_BYTES, block_stop - start)
                if os.pwrite(outputs[name], buffer[:wanted], start) != wanted:
                    raise OSError(f"short write of {name} at {start}")

    with ThreadPoolExecutor(threads) as pool:
        for worker in [pool.submit(work) for _ in range(threads)]:
            worker.result()
