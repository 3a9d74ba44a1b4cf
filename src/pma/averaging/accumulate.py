"""The arithmetic of one tile: sources in fixed order into a wider accumulator, divided once, cast once.

Inputs of 16 bits accumulate in fp32, inputs of 32 and 64 bits in fp64. Every step is one element-wise IEEE
operation, compiled without fast-math and so without fused multiply-add: a result does not depend on tile,
vector width or threads. bfloat16, which numpy does not know, is its 16 bits as uint16.
"""

# B elements in a tile, N sources in order

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.averaging import AT_ONCE, kernels
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
        kernels.add_four(accumulator_B, *rows, *map(one, weights_N), first)
        return
    for row, weight in zip(rows, weights_N, strict=True):
        kernels.add_one(accumulator_B, row, one(weight), first)
        first = False


def finish(accumulator_B: Array, out_B: Array, dtype: DType, *, divisor: int | None) -> bool:
    """Out = accumulator / divisor, cast once to `dtype`, to the nearest even. No divisor leaves the sum.

    Returns whether every result is finite.
    """
    # sum first, divide once: 1/N is not representable and costs 1% of the roundings
    by = accumulator_B.dtype.type(divisor or 1)
    if dtype is not DType.F16:
        return bool(kernels.divide_and_cast(accumulator_B, out_B, by))
    wide_B = np.empty(len(out_B), np.float32)
    kernels.divide_and_cast(accumulator_B, wide_B.view(np.uint32), by)
    with np.errstate(over="ignore", invalid="ignore"):
        out_B[:] = wide_B
    return bool(np.isfinite(out_B).all())
