"""How much memory streaming takes, and how much is done at a time so that it stays within a budget."""

# K merges made from one read

from __future__ import annotations

from pma.averaging import AT_ONCE
from pma.engine.blocks import CHUNK_BYTES
from pma.errors import UsageError
from pma.quantities import bytes_text

DEFAULT_MEMORY_BYTES = 384 * 2**20
LARGEST_TILE_BYTES = 2**19
_SMALLEST_TILE_BYTES = 2**16
#: what is read ahead of its use from stores, and how many requests for it are under way at once
READ_AHEAD_BYTES = 128 * 2**20
IN_FLIGHT = 16
# the driver's code, and what it holds of the answers that are coming in
_STORE_MEMORY_BYTES = 128 * 2**20
# interpreter, numpy and the compiler behind the arithmetic; measured, see benchmarks/README.md
_BASE_MEMORY_BYTES = 190 * 2**20
_NAME_BYTES = 256


def worker_bytes(tile_bytes: int, merges: int) -> int:
    """Buffers of one thread: a few tiles as read (fp16 also widened), and an accumulator and a block for each
    merge.
    """
    return 3 * AT_ONCE * tile_bytes + merges * (2 * tile_bytes + CHUNK_BYTES)


def tile_bytes_within(memory_bytes: int, threads: int, merges: int) -> int:
    """The largest tile that keeps `threads` workers within `memory_bytes`. Raises UsageError where none
    does.
    """
    tile_bytes = LARGEST_TILE_BYTES
    while threads * worker_bytes(tile_bytes, merges) > memory_bytes:
        tile_bytes //= 2
        if tile_bytes < _SMALLEST_TILE_BYTES:
            needed = threads * worker_bytes(_SMALLEST_TILE_BYTES, merges)
            raise UsageError(
                f"--memory {bytes_text(memory_bytes)} is too little for {threads} threads, which need "
                f"{bytes_text(needed)}; give more, or fewer --threads"
            )
    return tile_bytes


def rows_tile_bytes_within(memory_bytes: int, threads: int, rows: int) -> int:
    """The largest tile of which `threads` workers can each hold one of every source, as read (fp16 also
    widened). Raises UsageError where none is small enough.
    """
    tile_bytes = LARGEST_TILE_BYTES
    while 3 * threads * rows * tile_bytes > memory_bytes:
        tile_bytes //= 2
        if tile_bytes < _SMALLEST_TILE_BYTES:
            needed = 3 * threads * rows * _SMALLEST_TILE_BYTES
            raise UsageError(
                f"--memory {bytes_text(memory_bytes)} is too little for {rows} checkpoints at once in "
                f"{threads} threads, which need {bytes_text(needed)}; give more, fewer --threads, or fewer "
                "checkpoints"
            )
    return tile_bytes


def merges_within(memory_bytes: int, threads: int, result_bytes: int = 0) -> int:
    """How many merges can be made from one read, at least 1, with the largest tiles.

    `result_bytes`: what each result takes where it is kept in memory.
    """
    room = memory_bytes - threads * worker_bytes(LARGEST_TILE_BYTES, 0)
    each = (
        threads * (worker_bytes(LARGEST_TILE_BYTES, 1) - worker_bytes(LARGEST_TILE_BYTES, 0)) + result_bytes
    )
    return max(1, room // each)


def peak_memory_bytes(
    tile_bytes: int, threads: int, merges: int, names: int, *, from_stores: bool = False
) -> int:
    """What the process will take at most. `names`: tensors of all sources together, which readers index by
    name. `from_stores`: some of the sources are not on this machine.
    """
    ahead = READ_AHEAD_BYTES + _STORE_MEMORY_BYTES if from_stores else 0
    return _BASE_MEMORY_BYTES + names * _NAME_BYTES + threads * worker_bytes(tile_bytes, merges) + ahead
