"""Whether the chunks of a tensor are its parts: each element in exactly one of them."""

# C chunks, D dimensions

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pma.errors import FormatError

Integers = NDArray[np.int64]
_MOST_CELLS = 2**24


def check_cover(shape: tuple[int, ...], starts_CD: Integers, sizes_CD: Integers, where: str) -> None:
    """Raises FormatError, beginning with `where`, for a chunk outside the tensor, an overlap or a hole.

    The edges of all chunks cut the tensor into cells; each chunk is a box of whole cells, and as many cells
    as there are must be covered, each once.
    """
    limits = np.array(shape, np.int64)
    ends_CD = starts_CD + sizes_CD
    if (ends_CD > limits).any() or math.prod(shape) >= 2**62:
        raise FormatError(f"{where}: a chunk lies outside the shape {shape}")
    if 0 in shape:
        return
    edges = [
        np.unique(np.concatenate([starts_CD[:, axis], ends_CD[:, axis], [0, size]]))
        for axis, size in enumerate(shape)
    ]
    grid = [len(edge) - 1 for edge in edges]
    cells = math.prod(grid)
    low_CD = _cell_numbers(edges, starts_CD)
    span_CD = _cell_numbers(edges, ends_CD) - low_CD
    if cells > _MOST_CELLS or span_CD.prod(axis=1, dtype=np.float64).sum() != cells:
        raise FormatError(f"{where}: its chunks overlap, or leave a hole")
    covered = np.zeros(grid, np.uint8)
    if (span_CD == 1).all():
        covered[tuple(low_CD.T)] = 1
    else:
        for low_D, span_D in zip(low_CD.tolist(), span_CD.tolist(), strict=True):
            covered[tuple(slice(a, a + n) for a, n in zip(low_D, span_D, strict=True))] = 1
    if not covered.all():
        raise FormatError(f"{where}: its chunks overlap, or leave a hole")


def _cell_numbers(edges: list[Integers], points_CD: Integers) -> Integers:
    numbers = [np.searchsorted(edge, points_CD[:, axis]) for axis, edge in enumerate(edges)]
    return np.stack(numbers, axis=1) if numbers else np.zeros(points_CD.shape, np.int64)
