"""The compiled loops behind `accumulate`, and one that also reads what it adds.

All are compiled without fast-math. bfloat16 is its 16 bits as uint16. They stand in one file because the
compiler keeps its results by file: a loop is compiled again only when its own file changes.
"""

# B elements in a tile, N sources, K merges, C cuts

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

#: what `read_and_average` returns
DONE, NOT_FINITE, READ_FAILED, STOPPED = 0, 1, 2, 3
#: values of a member: not in the merge, its first, one of the others
ABSENT, FIRST, LATER = 0, 1, 2
_QUIET_NAN = 0x7FC0
_WRONG = 0x80000000
_FOUR = 4

_pread: Any = types.ExternalFunction(
    "pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64)
)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; the machine code is kept beside the module or in the user's cache folder."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither place can be written to
        return njit(nogil=True, error_model="numpy")(function)


def _widened(bits: Any) -> Any:
    """A stored value as a float: bfloat16 is the upper half of an fp32."""
    raise NotImplementedError("compiled only")


@overload(_widened, strict=False)
def _widened_compiled(bits: Any) -> Any:
    if bits == types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return lambda bits: bits


def _store(out: Any, i: int, value: Any) -> Any:
    """Put `value` into `out[i]` as its type wants it; bit `_WRONG` of the answer tells that it is not
    finite.
    """
    raise NotImplementedError("compiled only")


@overload(_store, strict=False)
def _store_compiled(out: Any, i: Any, value: Any) -> Any:
    if out.dtype == types.uint16:

        def store(out: Any, i: Any, value: Any) -> Any:
            bits = _fp32_bits(value)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            out[i] = np.uint16(rounded) if value == value else np.uint16(_QUIET_NAN)
            # from half a step above the largest bfloat16 on, this carries into the topmost bit
            return (bits & np.uint32(0x7FFFFFFF)) + np.uint32(0x00808000)

    elif out.dtype == types.uint32:

        def store(out: Any, i: Any, value: Any) -> Any:
            out[i] = _fp32_bits(value)  # on the way to a 16-bit type
            return np.uint32(0)

    else:

        def store(out: Any, i: Any, value: Any) -> Any:
            out[i] = value
            return np.uint32(0 if np.isfinite(out[i]) else _WRONG)

    return store


def _fp32_bits(value: Any) -> Any:
    """The bits of `value` in fp32; from fp64 rounded to odd, so that a second rounding is exact.

    Towards zero with the last bit set if anything was lost. Source: Boldo and Melquiond, "Emulation of FMA
    and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    raise NotImplementedError("compiled only")


@overload(_fp32_bits, strict=False)
def _fp32_bits_compiled(value: Any) -> Any:
    if value == types.float32:
        return lambda value: np.float32(value).view(np.uint32)

    def to_odd(value: Any) -> Any:
        nearest = np.float32(value)
        bits = nearest.view(np.uint32)
        if np.isfinite(value) and np.float64(nearest) != value:
            away = abs(np.float64(nearest)) > abs(value)
            bits = np.uint32(bits - np.uint32(away)) | np.uint32(1)
        return bits

    return to_odd


@_compiled
def add_one(accumulator: Any, values: Any, weight: Any, first: bool) -> None:
    """Accumulator += weight · values; `first` replaces what the accumulator holds."""
    if first:
        for i in range(len(accumulator)):
            accumulator[i] = weight * _widened(values[i])
    else:
        for i in range(len(accumulator)):
            accumulator[i] += weight * _widened(values[i])


@_compiled
def add_four(
    accumulator: Any, a: Any, b: Any, c: Any, d: Any, w_a: Any, w_b: Any, w_c: Any, w_d: Any, first: bool
) -> None:
    """The same for four sources, one after the other, reading and writing the accumulator once."""
    for i in range(len(accumulator)):
        product = w_a * _widened(a[i])
        total = product if first else accumulator[i] + product
        total = total + w_b * _widened(b[i])
        total = total + w_c * _widened(c[i])
        accumulator[i] = total + w_d * _widened(d[i])


@_compiled
def add_some(accumulator: Any, rows: Any, several: int, members: Any, weights: Any) -> None:
    """Those of the first `several` rows that are members, in order; four members together."""
    size = len(accumulator)
    if several == _FOUR and np.all(members[:_FOUR] != ABSENT):
        a, b, c, d = rows[0][:size], rows[1][:size], rows[2][:size], rows[3][:size]
        w_a, w_b, w_c, w_d = weights[0], weights[1], weights[2], weights[3]
        add_four(accumulator, a, b, c, d, w_a, w_b, w_c, w_d, members[0] == FIRST)
        return
    for r in range(several):
        if members[r] != ABSENT:
            add_one(accumulator, rows[r][:size], weights[r], members[r] == FIRST)


@_compiled
def divide_and_cast(accumulator: Any, out: Any, divisor: Any) -> Any:
    """Out = accumulator / divisor as `out` stores it; whether all of it is finite."""
    found = np.uint32(0)  # not a boolean, whose loop would stay scalar
    for i in range(len(out)):
        found |= _store(out, i, accumulator[i] / divisor)
    return (found & np.uint32(_WRONG)) == 0


@_compiled
def read_runs(descriptor: int, offsets_R: Any, places_R: Any, lengths_R: Any, out: Any) -> int:
    """Read from each byte offset of an open file so many bytes to their place in `out`."""
    for r in range(len(offsets_R)):
        length = lengths_R[r]
        into = out[places_R[r] : places_R[r] + length].ctypes
        if _pread(descriptor, into, np.uint64(length), np.int64(offsets_R[r])) != length:
            return READ_FAILED
    return DONE


@_compiled
def read_tile(
    descriptors_N: Any,
    offsets_N: Any,
    low: int,
    size: int,
    members_KN: Any,
    weights_KN: Any,
    rows: Any,
    sums_KB: Any,
    stop: Any,
) -> int:
    """Read `size` elements of each source, `low` of them after its byte offset, and add them up."""
    width, at_once = rows.itemsize, rows.shape[0]
    wanted = size * width
    for n in range(0, len(descriptors_N), at_once):
        several = min(at_once, len(descriptors_N) - n)
        for r in range(several):
            if stop[0]:
                return STOPPED
            offset = offsets_N[n + r] + low * width
            if _pread(descriptors_N[n + r], rows[r].ctypes, np.uint64(wanted), np.int64(offset)) != wanted:
                return READ_FAILED  # the caller reads again and finds out why
        for k in range(len(sums_KB)):
            add_some(sums_KB[k][:size], rows, several, members_KN[k][n:], weights_KN[k][n:])
    return DONE


@_compiled
def read_and_average(
    descriptors_CN: Any,
    offsets_CN: Any,
    counts_C: Any,
    members_KN: Any,
    weights_KN: Any,
    divisors_K: Any,
    rows: Any,
    sums_KB: Any,
    outs: Any,
    places_K: Any,
    start: int,
    stop: Any,
) -> int:
    """Elements from `start` on of the merges `places_K` of `outs`, cut by cut of `counts_C` elements, tile by
    tile.

    A cut lies in one piece in each source, from its byte offset in an open file, and is read once, by
    requests of one row of `rows`. No interpreter runs in between: hence faster than reading from Python.
    """
    outcome = DONE
    for c in range(len(counts_C)):
        for low in range(0, counts_C[c], rows.shape[1]):
            size = min(rows.shape[1], counts_C[c] - low)
            read: int = read_tile(
                descriptors_CN[c], offsets_CN[c], low, size, members_KN, weights_KN, rows, sums_KB, stop
            )
            if read != DONE:
                return read
            for k in range(len(places_K)):
                out = outs[places_K[k]][start + low : start + low + size]
                if not divide_and_cast(sums_KB[k][:size], out, divisors_K[k]):
                    outcome = NOT_FINITE
        start += counts_C[c]
    return outcome
