"""The compiled loop behind a Gram matrix: inner products of what differs between checkpoints.

Of values of 16 and 32 bits, deviations from the reference and the sums of a stretch are fp32, at twice the
speed of fp64; stretches are added in fp64. So an inner product is off by about 1e-7 of the two lengths.
Where fp32 overflows, the stretch is added in fp64. Values of 64 bits are fp64 throughout. Sums may be taken
in another order than written, so that they run in vectors: hence no promise of bits.
"""

# N checkpoints, B elements of a tile, T elements of a stretch that stays in the processor's cache

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pma.averaging.accumulate import STORAGE
from pma.averaging.kernels import DONE, READ_FAILED, STOPPED, _pread, _widened
from pma.types import DType

# of a row of a stretch: so much of twenty checkpoints lies in the first cache
_STRETCH_BYTES = 2**11
_LARGE = 1e38
# no assumption that all is finite: NaN must come through
_REORDERED = {"reassoc", "contract", "nsz"}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, error_model="numpy", fastmath=_REORDERED, cache=True)(function)
    except RuntimeError:  # nowhere to keep the machine code
        return njit(nogil=True, error_model="numpy", fastmath=_REORDERED)(function)


@_compiled
def _add_four_wide_products(a: Any, b: Any, c: Any, d: Any, i: int, j: int, gram_NN: Any) -> None:
    for t in range(len(a)):
        gram_NN[i, j] += np.float64(a[t]) * np.float64(c[t])
        gram_NN[i, j + 1] += np.float64(a[t]) * np.float64(d[t])
        gram_NN[i + 1, j] += np.float64(b[t]) * np.float64(c[t])
        gram_NN[i + 1, j + 1] += np.float64(b[t]) * np.float64(d[t])


@_compiled
def _add_four_products(rows_NT: Any, i: int, j: int, size: int, gram_NN: Any) -> None:
    """Products of rows i and i + 1 with rows j and j + 1: four sums from four loads."""
    a, b, c, d = rows_NT[i][:size], rows_NT[i + 1][:size], rows_NT[j][:size], rows_NT[j + 1][:size]
    ac = ad = bc = bd = rows_NT.dtype.type(0)
    for t in range(size):
        ac += a[t] * c[t]
        ad += a[t] * d[t]
        bc += b[t] * c[t]
        bd += b[t] * d[t]
    # a comparison, which NaN fails too: isfinite is x - x = 0 to a compiler that may reorder
    if not (abs(ac) < _LARGE and abs(ad) < _LARGE and abs(bc) < _LARGE and abs(bd) < _LARGE):
        _add_four_wide_products(a, b, c, d, i, j, gram_NN)
        return
    gram_NN[i, j] += ac
    gram_NN[i, j + 1] += ad
    gram_NN[i + 1, j] += bc
    gram_NN[i + 1, j + 1] += bd


@_compiled
def _put_deviations(rows_NB: Any, start: int, size: int, count: int, deviations_NT: Any) -> None:
    """The newest checkpoint as it is, and how far each other one lies from it."""
    newest = deviations_NT[count - 1]
    for t in range(size):
        newest[t] = _widened(rows_NB[count - 1, start + t])
    for n in range(count - 1):
        row, out = rows_NB[n][start : start + size], deviations_NT[n]
        for t in range(size):
            out[t] = _widened(row[t]) - newest[t]


@_compiled
def add_products(rows_NB: Any, low: int, high: int, count: int, deviations_NT: Any, gram_NN: Any) -> None:
    """Add the inner products over elements `low` to `high` to the lower triangle of `gram_NN`.

    The first `count` of `rows_NB` are checkpoints, the newest last. Row and column `count` - 1 are of the
    newest itself, the others of deviations from it. `deviations_NT` and `gram_NN` have an even number of
    rows, which may be one more: it holds zeros.
    """
    for start in range(low, high, deviations_NT.shape[1]):
        size = min(deviations_NT.shape[1], high - start)
        _put_deviations(rows_NB, start, size, count, deviations_NT)
        for i in range(0, len(deviations_NT), 2):
            for j in range(0, i + 2, 2):
                _add_four_products(deviations_NT, i, j, size, gram_NN)


@_compiled
def read_and_add_products(
    descriptors_CN: Any,
    offsets_CN: Any,
    counts_C: Any,
    edges_E3: Any,
    rows_NB: Any,
    deviations_NT: Any,
    gram_GNN: Any,
    stop: Any,
) -> int:
    """The same for a span, cut by cut of `counts_C` elements, each of which lies in one piece in each source,
    from its byte offset in an open file. `edges_E3`: group, first element and element after the last.

    Nothing is to be used of `gram_GNN` unless the answer is `DONE`.
    """
    count, width = descriptors_CN.shape[1], rows_NB.itemsize
    position = 0
    for c in range(len(counts_C)):
        for low in range(0, counts_C[c], rows_NB.shape[1]):
            size = min(rows_NB.shape[1], counts_C[c] - low)
            for n in range(count):
                if stop[0]:
                    return STOPPED
                wanted, offset = size * width, offsets_CN[c, n] + low * width
                into = rows_NB[n].ctypes
                if _pread(descriptors_CN[c, n], into, np.uint64(wanted), np.int64(offset)) != wanted:
                    return READ_FAILED
            for e in range(len(edges_E3)):
                first = max(edges_E3[e, 1] - position, 0)
                after = min(edges_E3[e, 2] - position, size)
                if first < after:
                    group_NN = gram_GNN[edges_E3[e, 0]]
                    add_products(rows_NB, first, after, count, deviations_NT, group_NN)
            position += size
    return DONE


def stretch_of(dtype: DType, checkpoints: int) -> NDArray[Any]:
    """Room for the deviations of a stretch of values stored as `dtype`, zeros; an even number of rows."""
    wide = np.dtype(np.float64 if STORAGE[dtype] == np.float64 else np.float32)
    return np.zeros((checkpoints + checkpoints % 2, _STRETCH_BYTES // wide.itemsize), wide)


def load_kernel(types: Iterable[DType]) -> None:
    """Compile, or load from the compiler's cache, the loop for values of each type; else the first tile
    would.
    """
    for dtype in types:
        rows_NB = np.zeros((1, 1), np.float32 if dtype is DType.F16 else STORAGE[dtype])
        deviations_NT, gram_GNN, none = stretch_of(dtype, 1), np.zeros((1, 2, 2)), np.empty(0, np.int64)
        add_products(rows_NB, 0, 0, 1, deviations_NT, gram_GNN[0])
        descriptors_CN, offsets_CN = np.empty((0, 1), np.int32), np.empty((0, 1), np.int64)
        edges_E3, stop = np.empty((0, 3), np.int64), np.zeros(1, np.uint8)
        read_and_add_products(
            descriptors_CN, offsets_CN, none, edges_E3, rows_NB, deviations_NT, gram_GNN, stop
        )
