"""The arithmetic of one tile: sources in fixed order into a wider accumulator, divided once, cast once.

Inputs of 16 bits accumulate in fp32, inputs of 32 and 64 bits in fp64. Every step is one element-wise IEEE
operation, compiled without fast-math and so without fused multiply-add: a result does not depend on tile,
vector width or threads. bfloat16, which numpy does not know, is its 16 bits as uint16.
"""

# B elements in a tile, N sources in order

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from pma.averaging import AT_ONCE
from pma.types import DType

Array = NDArray[Any]

#: how values of each averaged type lie in memory; a complex number is averaged as its two real parts
STORAGE: dict[DType, type[np.generic]] = {
    DType.BF16: np.uint16,
    DType.F16: np.float16,
    DType.F32: np.float32,
    DType.F64: np.float64,
    DType.C64: np.float32,
}
_QUIET_NAN = 0x7FC0


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; the machine code is kept beside the module or in the user's cache folder."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither place can be written to
        return njit(nogil=True, error_model="numpy")(function)


def accumulator_dtype(dtype: DType) -> type[np.floating[Any]]:
    """The type that sums of `dtype` are kept in."""
    return np.float32 if dtype.bits <= 16 else np.float64


def add(accumulator_B: Array, values_NB: Sequence[Array], weights_N: Sequence[float], *, first: bool) -> None:
    """Accumulator += weight · values for each source in turn, rounding after each operation.

    `first`: the accumulator holds nothing yet; the first product replaces it (adding to zero would turn -0
    into +0). A weight of 1 leaves values as they are. At most `AT_ONCE` sources.
    """
    one = accumulator_B.dtype.type
    rows = [row.astype(np.float32) if row.dtype == np.float16 else row for row in values_NB]
    if len(rows) == AT_ONCE:
        _add_four(accumulator_B, *rows, *map(one, weights_N), first)
        return
    for row, weight in zip(rows, weights_N, strict=True):
        _add_one(accumulator_B, row, one(weight), first)
        first = False


def finish(accumulator_B: Array, out_B: Array, dtype: DType, *, divisor: int | None) -> bool:
    """Out = accumulator / divisor, cast once to `dtype`, to the nearest even. No divisor leaves the sum.

    Returns whether every result is finite.
    """
    # sum first, divide once: 1/N is not representable and costs 1% of the roundings
    by = accumulator_B.dtype.type(divisor or 1)
    if dtype is not DType.F16:
        return bool(_divide_and_cast(accumulator_B, out_B, by))
    wide_B = np.empty(len(out_B), np.float32)
    _divide_and_cast(accumulator_B, wide_B.view(np.uint32), by)
    with np.errstate(over="ignore", invalid="ignore"):
        out_B[:] = wide_B
    return bool(np.isfinite(out_B).all())


@_compiled
def _add_one(accumulator: Any, values: Any, weight: Any, first: bool) -> None:
    if first:
        for i in range(len(accumulator)):
            accumulator[i] = weight * _widened(values[i])
    else:
        for i in range(len(accumulator)):
            accumulator[i] += weight * _widened(values[i])


@_compiled
def _add_four(
    accumulator: Any, a: Any, b: Any, c: Any, d: Any, w_a: Any, w_b: Any, w_c: Any, w_d: Any, first: bool
) -> None:
    for i in range(len(accumulator)):
        product = w_a * _widened(a[i])
        total = product if first else accumulator[i] + product
        total = total + w_b * _widened(b[i])
        total = total + w_c * _widened(c[i])
        accumulator[i] = total + w_d * _widened(d[i])


@_compiled
def _divide_and_cast(accumulator: Any, out: Any, divisor: Any) -> Any:
    wrong = np.uint32(0)  # not a boolean, whose loop would stay scalar
    for i in range(len(out)):
        wrong |= _store(out, i, accumulator[i] / divisor)
    return wrong == 0


def _widened(bits: Any) -> Any:
    """A stored value as a float: bfloat16 is the upper half of an fp32."""
    raise NotImplementedError("compiled only")


@overload(_widened, strict=False)
def _widened_compiled(bits: Any) -> Any:
    if bits == types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return lambda bits: bits


def _store(out: Any, i: int, value: Any) -> Any:
    """Put `value` into `out[i]` as its type wants it; 1 where that is not finite, else 0."""
    raise NotImplementedError("compiled only")


@overload(_store, strict=False)
def _store_compiled(out: Any, i: Any, value: Any) -> Any:
    if out.dtype == types.uint16:

        def store(out: Any, i: Any, value: Any) -> Any:
            bits = _fp32_bits(value)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            out[i] = np.uint16(rounded) if value == value else np.uint16(_QUIET_NAN)
            return np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80))

    elif out.dtype == types.uint32:

        def store(out: Any, i: Any, value: Any) -> Any:
            out[i] = _fp32_bits(value)  # on the way to a 16-bit type
            return np.uint32(0)

    else:

        def store(out: Any, i: Any, value: Any) -> Any:
            out[i] = value
            return np.uint32(not np.isfinite(out[i]))

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
