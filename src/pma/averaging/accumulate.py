"""The arithmetic of one block: sources in fixed order into a wider accumulator, divided once, cast once.

Inputs of 16 bits accumulate in fp32, inputs of 32 and 64 bits in fp64. Every step is one element-wise IEEE
operation with no fused multiply-add, so that a result does not depend on block size, vector width or threads.
"""

# B elements in a block, N checkpoints

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pma.types import DType

TORCH_DTYPES = {
    DType.BOOL: torch.bool,
    DType.U8: torch.uint8,
    DType.I8: torch.int8,
    DType.U16: torch.uint16,
    DType.I16: torch.int16,
    DType.U32: torch.uint32,
    DType.I32: torch.int32,
    DType.U64: torch.uint64,
    DType.I64: torch.int64,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
    DType.C64: torch.complex64,
}

# elements worked on at a time, so that accumulator and scratch stay in the second-level cache
_TILE_ELEMENTS = 65_536


def accumulator_dtype(dtype: DType) -> torch.dtype:
    """The type that sums of `dtype` are kept in."""
    return torch.float32 if dtype.bits <= 16 else torch.float64


def add(
    accumulator_B: Tensor, values_B: Tensor, scratch: Tensor, *, weight: float | None, first: bool
) -> None:
    """Accumulator += weight · values, rounding once after each of the two operations; no weight means 1."""
    for accumulator, values in _tiles(accumulator_B, values_B):
        if first:
            accumulator.copy_(values)  # not zero plus values: that would turn -0 into +0
            if weight is not None:
                accumulator.mul_(weight)
        elif weight is None:
            wide = scratch[: len(values)].copy_(values)
            accumulator.add_(wide)
        else:
            wide = scratch[: len(values)].copy_(values)
            accumulator.add_(wide.mul_(weight))


def finish(accumulator_B: Tensor, out_B: Tensor, *, divisor: int | None) -> None:
    """Out = accumulator / divisor, cast once to out's type, to the nearest even."""
    if divisor is not None:
        # sum first, divide once: 1/N is not representable and costs 1% of the roundings
        accumulator_B.div_(divisor)
    if accumulator_B.dtype == torch.float64 and out_B.element_size() == 2:
        accumulator_B = _rounded_to_odd(accumulator_B)
    out_B.copy_(accumulator_B)


def _rounded_to_odd(values_B: Tensor) -> Tensor:
    """fp64 to fp32, towards zero with the last bit set if anything was lost: a second rounding, to 16 bits,
    is then exact.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008.
    """
    nearest_B = values_B.to(torch.float32)
    inexact_B = nearest_B.to(torch.float64) != values_B
    away_B = inexact_B & (nearest_B.to(torch.float64).abs() > values_B.abs())
    bits_B = nearest_B.view(torch.int32)
    odd_B = (bits_B - away_B.to(torch.int32)) | inexact_B.to(torch.int32)
    finite_B = torch.isfinite(values_B)
    return torch.where(finite_B, odd_B, bits_B).view(torch.float32)


def all_finite(values_B: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # a sum is one pass without a temporary; only where it is not finite each element is looked at
    return bool(torch.isfinite(values_B.sum())) or bool(torch.isfinite(values_B).all())


def scratch_for(accumulator_B: Tensor) -> Tensor:
    """Room for one tile of widened values."""
    return torch.empty(min(len(accumulator_B), _TILE_ELEMENTS), dtype=accumulator_B.dtype)


def _tiles(accumulator_B: Tensor, values_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(accumulator_B.split(_TILE_ELEMENTS), values_B.split(_TILE_ELEMENTS), strict=True)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads off in this block: the engine's workers are the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
