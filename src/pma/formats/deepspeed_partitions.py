"""Where parameters lie in ZeRO's flat vectors: arithmetic over how stages 1 to 3 cut them among ranks.

Stages 1 and 2 lay the parameters of a group one after the other and cut that vector among the ranks; a
parameter may begin in one rank's part and end in another's. Stage 3 cuts every parameter among all ranks, the
last part padded; a rank lays its parts of all parameters one after the other.

Source: deepspeed 0.19.8, `utils/zero_to_fp32.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pma.errors import FormatError, printable
from pma.formats.deepspeed_states import ModelStates, Shape
from pma.formats.torch_archive import StoredTensor
from pma.types import Fragment


@dataclass(frozen=True)
class Place:
    """`count` elements from `start` of vector `row` that are a parameter's from `flat_start` on."""

    row: int
    start: int
    count: int
    flat_start: int


class Vector:
    """Stored tensors that are, one after the other, one flat vector; of each only `counts` elements."""

    def __init__(self, tensors: Sequence[StoredTensor], counts: Sequence[int]) -> None:
        self._tensors = tensors
        self._starts = [0, *accumulate(counts)]

    def fragments(self, name: str, place: Place) -> Iterator[Fragment]:
        """The pieces of files that hold a parameter's elements of this vector."""
        start, stop = place.start, place.start + place.count
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            tensor = self._tensors[number]
            count = min(stop, self._starts[number + 1]) - start
            if count:
                width = tensor.dtype.bits // 8
                yield Fragment(
                    tensor=name,
                    file=tensor.file,
                    offset_bytes=tensor.offset_bytes + (start - self._starts[number]) * width,
                    length_bytes=count * width,
                    flat_start=place.flat_start + start - place.start,
                )
            start, number = start + count, number + 1


class JoinedGroups:
    """Stages 1 and 2: vector by group, its pieces by rank."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Shape]],
        counts: Sequence[Sequence[int]],
        alignments: Sequence[Sequence[int]] | None,
        where: str,
    ) -> None:
        """`counts`: by rank, by group, the elements stored. `alignments`: elements free behind each
        parameter.
        """
        self.counts_by_row = [list(column) for column in zip(*counts, strict=True)]
        self._place: dict[str, Place] = {}
        if len(groups) != len(self.counts_by_row):
            raise FormatError(
                f"{where}: {len(groups)} groups of shapes, {len(self.counts_by_row)} of weights"
            )
        if alignments is not None and [len(row) for row in alignments] != [len(group) for group in groups]:
            raise FormatError(f"{where}: paddings between parameters do not fit the parameters")
        for row, group in enumerate(groups):
            at = 0
            for number, (name, shape) in enumerate(group.items()):
                self._place[name] = Place(row, at, math.prod(shape), 0)
                at += math.prod(shape) + (alignments[row][number] if alignments is not None else 0)
                self._check_inside(name, row, where)
            self._check_length(at, row, len(counts), where)

    def _check_inside(self, name: str, row: int, where: str) -> None:
        place, stored = self._place[name], sum(self.counts_by_row[row])
        if place.start + place.count > stored:
            raise FormatError(
                f"{where}: {printable(name)} ends behind the {stored} elements that its group stores"
            )

    def _check_length(self, used: int, row: int, rank_count: int, where: str) -> None:
        # vectors are padded to a multiple of twice the ranks; what is stored lacks some of that padding
        step, stored = 2 * rank_count, sum(self.counts_by_row[row])
        if -(-used // step) != -(-stored // step):
            raise FormatError(
                f"{where}: the parameters of group {row} have {used} elements, the ranks store {stored}"
            )

    def vectors(self, tensors: Sequence[Sequence[StoredTensor]]) -> list[Vector]:
        """The flat vectors made of each rank's tensors (by rank, by group)."""
        columns = zip(zip(*tensors, strict=True), self.counts_by_row, strict=True)
        return [Vector(column, counts) for column, counts in columns]

    def places(self, name: str) -> Iterator[Place]:
        """Where a parameter lies."""
        yield self._place[name]


class CutParameters:
    """Stage 3: vector by rank, its pieces by group."""

    def __init__(
        self, groups: Sequence[Mapping[str, Shape]], counts: Sequence[Sequence[int]], where: str
    ) -> None:
        """`counts`: by rank, by group, the elements stored."""
        self.counts_by_row = [list(row) for row in counts]
        self._rank_count = len(counts)
        self._start_and_count: dict[str, tuple[int, int]] = {}
        at = 0
        for group in groups:
            for name, shape in group.items():
                self._start_and_count[name] = at, math.prod(shape)
                at += -(-math.prod(shape) // self._rank_count)
        for rank, row in enumerate(self.counts_by_row):
            if sum(row) != at:
                raise FormatError(
                    f"{where}: rank {rank} stores {sum(row)} elements, its parts of all parameters have {at}"
                )

    def vectors(self, tensors: Sequence[Sequence[StoredTensor]]) -> list[Vector]:
        """The flat vectors made of each rank's tensors (by rank, by group)."""
        return [Vector(row, counts) for row, counts in zip(tensors, self.counts_by_row, strict=True)]

    def places(self, name: str) -> Iterator[Place]:
        """Where a parameter's parts lie; a part that is all padding is none."""
        start, count = self._start_and_count[name]
        part = -(-count // self._rank_count)
        for rank in range(self._rank_count if part else 0):
            if rank * part >= count:
                return
            yield Place(rank, start, min(part, count - rank * part), rank * part)


def frozen_fragments(files: Sequence[ModelStates], where: str) -> dict[str, tuple[Fragment, ...]]:
    """Where parameters lie that are not trained: whole, or in stage 3 cut among the ranks."""
    first, found = files[0], {}
    for name, shape in first.frozen_shapes.items():
        parts = [file.frozen.get(name) for file in files]
        tensors = [part for part in parts if part is not None and part.dtype == first.frozen[name].dtype]
        if len(tensors) < len(files) or not all(tensor.contiguous for tensor in tensors):
            raise FormatError(f"{where}: not every rank has its part of {printable(name)}")
        found[name] = _cut(name, shape, tensors, where)
    return found


def _cut(name: str, shape: Shape, tensors: Sequence[StoredTensor], where: str) -> tuple[Fragment, ...]:
    counts = [[tensor.element_count] for tensor in tensors]
    if len(tensors) == 1 and tensors[0].shape == shape:
        return (whole_fragment(name, tensors[0]),)
    cut = CutParameters([{name: shape}], counts, where)
    vectors = cut.vectors([[tensor] for tensor in tensors])
    return tuple(part for place in cut.places(name) for part in vectors[place.row].fragments(name, place))


def whole_fragment(name: str, tensor: StoredTensor) -> Fragment:
    """A tensor that is stored whole. Raises FormatError where its elements are not in order."""
    if not tensor.contiguous:
        raise FormatError(
            f"{tensor.file}: the elements of {printable(name)} do not lie one after the other (shape "
            f"{tensor.shape}, strides {tensor.stride}); save it with .contiguous()"
        )
    return Fragment(
        tensor=name,
        file=tensor.file,
        offset_bytes=tensor.offset_bytes,
        length_bytes=tensor.element_count * tensor.dtype.bits // 8,
        flat_start=0,
    )
