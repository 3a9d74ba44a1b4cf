"""Where elements of a tensor lie on disk, in runs: index arithmetic over shards of any shape."""

# R runs

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.types import Box, Fragment, TensorSpec

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Runs of elements that lie one after the other in a file, in ascending order of `first_R`.

    `first_R`: position of each run's first element among those asked for. `count_R`: its elements.
    `file_R`: number of its file in `files`. `offset_R`: where in the file it begins, in bytes.
    """

    files: tuple[str, ...]
    first_R: Integers
    count_R: Integers
    file_R: Integers
    offset_R: Integers


def runs_of(
    spec: TensorSpec, fragments: Sequence[Fragment], start: int, stop: int, box: Box | None = None
) -> Runs:
    """Where elements `start` to `stop` lie, counted row-major in `box` of the tensor (None: all of it)."""
    spec = spec.in_units
    width = spec.dtype.bits // 8
    asked = box or whole_box(spec.shape)
    files = tuple(dict.fromkeys(fragment.file for fragment in fragments))
    found: list[tuple[Integers, Integers, int, Integers]] = []
    for fragment in fragments:
        first_R, stored_R, count_R = _shared(spec.shape, asked, fragment, start, stop, width)
        if len(first_R):
            offset_R = fragment.offset_bytes + stored_R * width
            found.append((first_R, count_R, files.index(fragment.file), offset_R))
    if not found:
        none = np.empty(0, np.int64)
        return Runs(files=files, first_R=none, count_R=none, file_R=none, offset_R=none)
    first_R = np.concatenate([first for first, _, _, _ in found])
    order = np.argsort(first_R, kind="stable")
    return Runs(
        files=files,
        first_R=first_R[order],
        count_R=np.concatenate([count for _, count, _, _ in found])[order],
        file_R=np.concatenate([np.full(len(first), file) for first, _, file, _ in found])[order],
        offset_R=np.concatenate([offset for _, _, _, offset in found])[order],
    )


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that is the whole tensor."""
    return (0,) * len(shape), shape


def _shared(
    shape: tuple[int, ...], asked: Box, fragment: Fragment, start: int, stop: int, width: int
) -> tuple[Integers, Integers, Integers]:
    """Elements that a fragment holds of those asked for: (position, place in the fragment, count) of each
    run.
    """
    if fragment.box is not None:
        return _clipped(*_common_rows(asked, fragment.box, start, stop), start, stop)
    assert fragment.flat_start is not None
    # a flat fragment holds a range of the whole tensor: the rows of `asked` in the tensor, cut to that range
    first_R, flat_R, count_R = _clipped(*_common_rows(asked, whole_box(shape), start, stop), start, stop)
    low, high = fragment.flat_start, fragment.flat_start + fragment.length_bytes // width
    flat_R, first_R, count_R = _clipped(flat_R, first_R, count_R, low, high, base=False)
    return first_R, flat_R - low, count_R


def _clipped(
    key_R: Integers, other_R: Integers, count_R: Integers, low: int, high: int, *, base: bool = True
) -> tuple[Integers, Integers, Integers]:
    """Runs cut to `low` … `high` of their first coordinate, which then counts from `low` if `base`."""
    skipped_R = np.maximum(low - key_R, 0)
    stop_R = np.minimum(key_R + count_R, high)
    key_R, other_R = key_R + skipped_R, other_R + skipped_R
    keep = stop_R > key_R
    return key_R[keep] - (low if base else 0), other_R[keep], (stop_R - key_R)[keep]


def _common_rows(asked: Box, held: Box, start: int, stop: int) -> tuple[Integers, Integers, Integers]:
    """Runs that two boxes share: (position in `asked`, position in `held`, count), ascending.

    Rows of the outermost dimension that lie wholly outside `start` … `stop` of `asked` are left out.
    """
    none = np.empty(0, np.int64)
    (a_starts, a_sizes), (h_starts, h_sizes) = asked, held
    low = [max(a, h) for a, h in zip(a_starts, h_starts, strict=True)]
    high = [min(a + n, h + m) for a, n, h, m in zip(a_starts, a_sizes, h_starts, h_sizes, strict=True)]
    a_strides, h_strides = _strides(a_sizes), _strides(h_sizes)
    if low:  # the outermost rows that are asked for
        low[0] = max(low[0], a_starts[0] + start // max(a_strides[0], 1))
        high[0] = min(high[0], a_starts[0] + -(-stop // max(a_strides[0], 1)))
    sizes = [max(stop - start, 0) for start, stop in zip(low, high, strict=True)]
    if 0 in sizes:
        return none, none, none
    # trailing dimensions that both boxes hold whole belong to one run, and so does the one before them
    split = len(sizes)
    while split > 0 and sizes[split - 1] == a_sizes[split - 1] == h_sizes[split - 1]:
        split -= 1
    split = max(split - 1, 0)
    a_R = np.array([sum((x - a) * s for x, a, s in zip(low, a_starts, a_strides, strict=True))])
    h_R = np.array([sum((x - h) * s for x, h, s in zip(low, h_starts, h_strides, strict=True))])
    for size, a_stride, h_stride in zip(sizes[:split], a_strides, h_strides, strict=False):
        steps = np.arange(size, dtype=np.int64)
        a_R = (a_R[:, None] + steps * a_stride).reshape(-1)
        h_R = (h_R[:, None] + steps * h_stride).reshape(-1)
    return a_R, h_R, np.full(len(a_R), math.prod(sizes[split:]), np.int64)


def _strides(sizes: Sequence[int]) -> list[int]:
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * sizes[axis + 1]
    return strides
