"""Renaming, splitting, fusing, stacking and transposing tensors are all re-indexing: a target tensor is made
of pieces, each a strided view of a source tensor. Exact arithmetic on indices; no values are moved here.
"""

# Q ranges asked for, R runs

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pma.formats.runs import Integers, whole_box
from pma.types import Box, Fragment, TensorSpec


@dataclass(frozen=True, kw_only=True)
class View:
    """A strided window of a flattened tensor: element (i, j…) is at offset + i·strides[0] + j·strides[1]…"""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> View:
        """All of a tensor, row-major."""
        strides = [1] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * shape[axis + 1]
        return View(offset=0, shape=tuple(shape), strides=tuple(strides))

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    def split(self, axis: int, sizes: Sequence[int]) -> View:
        """`axis` as several, outermost first, whose sizes multiply to its own."""
        assert math.prod(sizes) == self.shape[axis], (self.shape, axis, sizes)
        inner = View.whole(sizes).strides
        return View(
            offset=self.offset,
            shape=(*self.shape[:axis], *sizes, *self.shape[axis + 1 :]),
            strides=(
                *self.strides[:axis],
                *(self.strides[axis] * stride for stride in inner),
                *self.strides[axis + 1 :],
            ),
        )

    def permuted(self, order: Sequence[int]) -> View:
        """Axis i of the result is axis `order[i]` of this."""
        assert sorted(order) == list(range(len(self.shape))), (self.shape, order)
        return View(
            offset=self.offset,
            shape=tuple(self.shape[axis] for axis in order),
            strides=tuple(self.strides[axis] for axis in order),
        )

    def cut(self, axis: int, start: int, stop: int) -> View:
        """Indices `start` to `stop` of an axis."""
        assert 0 <= start <= stop <= self.shape[axis], (self.shape, axis, start, stop)
        return View(
            offset=self.offset + start * self.strides[axis],
            shape=(*self.shape[:axis], stop - start, *self.shape[axis + 1 :]),
            strides=self.strides,
        )

    def at(self, axis: int, index: int) -> View:
        """One index of an axis, which is gone then."""
        assert 0 <= index < self.shape[axis], (self.shape, axis, index)
        return View(
            offset=self.offset + index * self.strides[axis],
            shape=(*self.shape[:axis], *self.shape[axis + 1 :]),
            strides=(*self.strides[:axis], *self.strides[axis + 1 :]),
        )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a target tensor and what it is in `source`: runs of `run` elements that lie together in both.

    Run (i, j, …) with i < sizes[0]… begins at target_start + i·target_strides[0] + … and at source_start +
    i·source_strides[0] + …. Runs ascend in the target and do not overlap there.
    """

    source: str
    run: int
    sizes: tuple[int, ...]
    target_start: int
    target_strides: tuple[int, ...]
    source_start: int
    source_strides: tuple[int, ...]

    @property
    def element_count(self) -> int:
        return self.run * math.prod(self.sizes)

    @property
    def target_stop(self) -> int:
        """One past its last element in the target."""
        reach = sum((n - 1) * stride for n, stride in zip(self.sizes, self.target_strides, strict=True))
        return self.target_start + reach + self.run

    def runs(
        self, start_Q: Integers, stop_Q: Integers, at_Q: Integers
    ) -> tuple[Integers, Integers, Integers]:
        """What the piece holds of the target's ranges `start_Q` to `stop_Q`: (position, source index, count)
        of each run, positions counted from `at_Q` where the range begins.
        """
        low_Q, high_Q = start_Q - self.target_start, stop_Q - self.target_start
        first_Q = self._runs_up_to(low_Q - self.run)
        count_Q = np.maximum(self._runs_up_to(high_Q - 1) - first_Q, 0)
        count_Q[(start_Q >= stop_Q) | (self.run == 0)] = 0
        of_R = np.repeat(np.arange(len(count_Q)), count_Q)
        rank_R = np.arange(len(of_R)) + (first_Q - np.cumsum(count_Q) + count_Q)[of_R]
        target_R, source_R = np.zeros_like(rank_R), np.full_like(rank_R, self.source_start)
        axes = list(zip(self.sizes, self.target_strides, self.source_strides, strict=True))
        for size, target_stride, source_stride in reversed(axes):
            rank_R, index_R = np.divmod(rank_R, size)
            target_R += index_R * target_stride
            source_R += index_R * source_stride
        begin_R = np.maximum(target_R, low_Q[of_R])
        end_R = np.minimum(target_R + self.run, high_Q[of_R])
        at_R = at_Q[of_R] + begin_R - low_Q[of_R]
        return at_R, source_R + begin_R - target_R, end_R - begin_R

    def _runs_up_to(self, place_Q: Integers) -> Integers:
        """How many runs begin at or before a place of the target, counted from `target_start`."""
        found_Q = np.zeros_like(place_Q)
        open_Q = place_Q >= 0  # places that lie inside the axes seen so far
        left_Q = np.where(open_Q, place_Q, 0)
        inside = math.prod(self.sizes)
        for size, stride in zip(self.sizes, self.target_strides, strict=True):
            inside //= size
            index_Q = left_Q // stride
            past_Q = open_Q & (index_Q >= size)
            found_Q += np.where(past_Q, size, np.where(open_Q, index_Q, 0)) * inside
            left_Q = left_Q - index_Q * stride
            open_Q = open_Q & ~past_Q
        return found_Q + open_Q


def piece_of(name: str, source: View, target: View) -> Piece:
    """The piece in which element i of `source`, a view of tensor `name`, is element i of `target`.

    `target` is a tensor whose axes were split, cut and permuted, so that its elements are distinct.
    """
    assert source.shape == target.shape, (source, target)
    axes = [
        (size, t, s)
        for size, t, s in zip(target.shape, target.strides, source.strides, strict=True)
        if size != 1
    ]
    axes.sort(key=lambda axis: -axis[1])
    merged: list[tuple[int, int, int]] = []
    for size, t, s in axes:
        if merged and merged[-1][1:] == (size * t, size * s):
            merged[-1] = (merged[-1][0] * size, t, s)
        else:
            merged.append((size, t, s))
    run = merged.pop()[0] if merged and merged[-1][1:] == (1, 1) else 1
    if target.element_count == 0:
        run, merged = 0, []
    return Piece(
        source=name,
        run=run,
        sizes=tuple(size for size, _, _ in merged),
        target_start=target.offset,
        target_strides=tuple(t for _, t, _ in merged),
        source_start=source.offset,
        source_strides=tuple(s for _, _, s in merged),
    )


def stored_piece(spec: TensorSpec, fragment: Fragment) -> Piece:
    """A fragment as a piece of its tensor, whose "source" is the fragment's own elements in their order."""
    if fragment.box is not None:
        return boxed_piece(spec.shape, fragment.box)
    assert fragment.flat_start is not None
    count = fragment.length_bytes * 8 // spec.dtype.bits
    flat = View(offset=fragment.flat_start, shape=(count,), strides=(1,))
    return piece_of("", View.whole((count,)), flat)


def boxed_piece(shape: tuple[int, ...], box: Box) -> Piece:
    """A box of a tensor as a piece of it, whose "source" are the box's elements, row-major."""
    inside = View.whole(shape)
    for axis, (start, size) in enumerate(zip(*box, strict=True)):
        inside = inside.cut(axis, start, start + size)
    return piece_of("", View.whole(box[1]), inside)


def ranges_of(shape: tuple[int, ...], box: Box | None, start: int, stop: int) -> tuple[Integers, ...]:
    """Elements `start` to `stop` of a box, row-major, as ranges of the tensor: (start, stop, position)."""
    asked = box or whole_box(shape)
    inside = View.whole(shape)
    for axis, (low, size) in enumerate(zip(*asked, strict=True)):
        inside = inside.cut(axis, low, low + size)
    piece = piece_of("", inside, View.whole(asked[1]))
    at_R, flat_R, count_R = piece.runs(*(np.array([x], np.int64) for x in (start, stop, 0)))
    return flat_R, flat_R + count_R, at_R


def covers(pieces: Sequence[Piece], element_count: int) -> bool:
    """Whether the pieces hold each of a target's elements exactly once."""
    if sum(piece.element_count for piece in pieces) != element_count:
        return False
    ordered = sorted(pieces, key=lambda piece: piece.target_start)
    stops = [piece.target_stop for piece in ordered]
    if all(b.target_start >= stop for b, stop in zip(ordered[1:], stops, strict=False)):
        return not ordered or stops[-1] <= element_count
    # pieces that lie inside one another's range: their runs, in order, must follow each other without a gap
    everything = np.array([0], np.int64), np.array([element_count], np.int64), np.array([0], np.int64)
    found = [piece.runs(*everything) for piece in ordered]
    at_R, count_R = (np.concatenate([columns[i] for columns in found]) for i in (0, 2))
    order = np.argsort(at_R, kind="stable")
    at_R, count_R = at_R[order], count_R[order]
    return bool((at_R[1:] == (at_R + count_R)[:-1]).all()) and int(count_R.sum()) == element_count
