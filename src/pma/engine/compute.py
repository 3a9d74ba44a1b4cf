"""One block of one or several merges from their sources, in memory: read once, add to each merge's
accumulator in checkpoint order, divide once, cast once.
"""

# N checkpoints, K merges, B elements of a tile, C cuts of a span

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.averaging import AT_ONCE
from pma.averaging.accumulate import STORAGE, accumulator_dtype, add, finish
from pma.averaging.kernels import (
    ABSENT,
    FIRST,
    LATER,
    NOT_FINITE,
    READ_FAILED,
    STOPPED,
    read_and_average,
    read_runs,
)
from pma.engine.blocks import CHUNK_BYTES, Block, Piece, Policy, Span
from pma.engine.means import read_from
from pma.engine.read_ahead import ReadAhead
from pma.engine.reading import MOST_CUTS, SpanReader, view
from pma.engine.segments import Segments
from pma.engine.stopping import StopFlag
from pma.engine.work import Recipe
from pma.errors import InputError, Interrupted, NonfiniteError, printable
from pma.formats.contracts import CheckpointReader, requests_for
from pma.formats.runs import Integers, whole_box
from pma.types import DType, Role

Buffer = NDArray[Any]
Where = tuple[Integers, list[tuple[int, int, str, int, int]]]

#: sources that a compiled loop holds open at once; systems allow a process 1024 files or fewer
MOST_OPEN = 64
# parts of a file this far apart are opened as one
_NEAR_BYTES = 2**20


class BlockWorker:
    """The buffers of one thread, reused for every block it makes."""

    def __init__(
        self,
        readers: Sequence[CheckpointReader],
        recipes: Sequence[Recipe],
        *,
        tile_bytes: int,
        allow_nonfinite: bool = False,
        stop: StopFlag | None = None,
        ahead: ReadAhead | None = None,
    ) -> None:
        self._source = SpanReader(readers, ahead)
        self._readers, self._recipes = readers, recipes
        self._tile_bytes = tile_bytes
        self._allow_nonfinite = allow_nonfinite
        self._stop = stop or StopFlag()
        self._rows = on_pages(AT_ONCE, tile_bytes)
        self._sums = on_pages(len(recipes), 2 * tile_bytes)
        self._outs = on_pages(len(recipes), CHUNK_BYTES)

    @property
    def bytes_read(self) -> int:
        """From all sources so far."""
        return self._source.bytes_read

    def make(self, block: Block, wanted: Sequence[int] | None = None) -> list[tuple[int, memoryview]]:
        """The block's bytes of each wanted merge (all by default), valid until the next call.

        Raises NonfiniteError for a value that is not finite, Interrupted where `stop` was set.
        """
        wanted = range(len(self._recipes)) if wanted is None else wanted
        for k in wanted:
            for offset, data in block.constants:
                self._outs[k][offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        for index, span in enumerate(block.spans):
            if span.policy is Policy.AVERAGE:
                if not self._average_directly(span, wanted):
                    self._average(block, index, wanted)
            elif span.policy is Policy.ZERO:
                for k in wanted:
                    self._outs[k][span.block_offset : span.block_offset + span.length_bytes] = 0
            else:
                self._copy(block, index, wanted)
        return [(k, view(self._outs[k][: block.length_bytes])) for k in wanted]

    def _copy(self, block: Block, index: int, wanted: Sequence[int]) -> None:
        span = block.spans[index]
        segments = Segments(span)
        for k in wanted:
            number = self._recipes[k].newest
            newest = self._readers[number]
            out = self._outs[k][span.block_offset : span.block_offset + span.length_bytes]
            self._source.read(block, index, segments, number, 0, out)
            if span.dtype_in in STORAGE and not self._allow_nonfinite:
                for piece in span.pieces:
                    if newest.tensors[piece.tensor].role is Role.OTHER:
                        continue  # a best score that is still infinite is no broken model
                    found = first_nonfinite(newest, piece)
                    if found is not None:
                        raise _nonfinite(piece.tensor, newest, *found)

    def _average_directly(self, span: Span, wanted: Sequence[int]) -> bool:
        """The same as `_average` in one compiled loop; False where that cannot do it, or failed to read."""
        if DType.F16 in (span.dtype_in, span.dtype_out):
            return False
        needed = sorted({number for k in wanted for number, _ in self._recipes[k].members})
        if len(needed) > MOST_OPEN:
            return False
        readers = [self._readers[number] for number in needed]
        segments = Segments(span)
        # sources that are sharded in other ways: from cut to cut the span lies in one piece in all of them
        cuts = segments.cuts(readers)
        if len(cuts) > MOST_CUTS:
            return False
        parts = [cuts]
        while parts:
            cuts = parts.pop()
            alike = {reader.layout_digest: reader for reader in readers}
            found = {digest: where(segments, reader, cuts) for digest, reader in alike.items()}
            places = [found[reader.layout_digest] for reader in readers]
            if len(cuts) > 2 and sum(len(runs) for _, runs in places) > MOST_OPEN:
                middle = len(cuts) // 2
                parts += [cuts[middle:], cuts[: middle + 1]]
            elif not self._average_cuts(span, wanted, needed, places, cuts):
                return False
        return True

    def _average_cuts(
        self,
        span: Span,
        wanted: Sequence[int],
        needed: Sequence[int],
        where: Sequence[Where],
        cuts: Integers,
    ) -> bool:
        """The span's bytes from the first of `cuts` to the last, from `where` they lie in each source."""
        width = span.dtype_in.bits // 8
        wide = accumulator_dtype(span.dtype_in)
        members_KN, weights_KN = _members([self._recipes[k] for k in wanted], needed, wide)
        per_element = 2 if span.dtype_in is DType.C64 else 1
        descriptors_NC = np.empty((len(needed), len(cuts) - 1), np.int32)
        with ExitStack() as opened:
            for row_C, number, (_, runs) in zip(descriptors_NC, needed, where, strict=True):
                for first, last, file, offset_bytes, length_bytes in runs:
                    descriptor = self._readers[number].descriptor(file, offset_bytes, length_bytes)
                    if descriptor is None:
                        return False
                    row_C[first:last] = opened.enter_context(descriptor)
            outcome = read_and_average(
                np.ascontiguousarray(descriptors_NC.T),
                np.stack([offset_C for offset_C, _ in where], axis=1),
                np.diff(cuts) // width * per_element,
                members_KN,
                weights_KN,
                np.array([self._recipes[k].divisor or 1 for k in wanted], wide),
                self._rows.view(STORAGE[span.dtype_in]),
                self._sums[: len(wanted)].view(wide),
                self._outs.view(STORAGE[span.dtype_out]),
                np.array(wanted, np.int64),
                (span.block_offset * 8 // span.dtype_out.bits + int(cuts[0]) // width) * per_element,
                self._stop.memory,
            )
        if outcome == STOPPED:
            raise Interrupted("stopped")
        if outcome == NOT_FINITE and not self._allow_nonfinite:
            return False  # slowly, and it will say where
        self._source.bytes_read += int(cuts[-1] - cuts[0]) * len(needed) if outcome != READ_FAILED else 0
        return bool(outcome != READ_FAILED)

    def _average(self, block: Block, index: int, wanted: Sequence[int]) -> None:
        span = block.spans[index]
        width = span.dtype_in.bits // 8
        tile_elements = self._tile_bytes // width
        segments = Segments(span)
        storage = STORAGE[span.dtype_in]
        wide = accumulator_dtype(span.dtype_in)
        groups = list(self._groups(wanted))
        for start in range(0, span.element_count, tile_elements):
            stop = min(start + tile_elements, span.element_count)
            rows = [row[: (stop - start) * width].view(storage) for row in self._rows]
            count = len(rows[0])  # a complex number counts twice
            sums_K = {k: self._sums[k].view(wide)[:count] for k in wanted}
            begun: set[int] = set()
            for numbers in groups:
                places = {number: i for i, number in enumerate(numbers)}
                for row, number in zip(self._rows, numbers, strict=False):
                    if self._stop.is_set():
                        raise Interrupted("stopped")
                    self._source.read(
                        block, index, segments, number, start * width, row[: (stop - start) * width]
                    )
                for k in wanted:
                    members = [(places[n], w) for n, w in self._recipes[k].members if n in places]
                    if members:
                        weights = [weight for _, weight in members]
                        add(sums_K[k], [rows[i] for i, _ in members], weights, first=k not in begun)
                        begun.add(k)
            for k in wanted:
                self._finish(span, start, stop, k, sums_K[k])

    def _groups(self, wanted: Sequence[int]) -> Iterator[list[int]]:
        """The readers that the wanted merges need, in order, a few at a time."""
        needed = sorted({number for k in wanted for number, _ in self._recipes[k].members})
        for first in range(0, len(needed), AT_ONCE):
            yield needed[first : first + AT_ONCE]

    def _finish(self, span: Span, start: int, stop: int, k: int, sums_B: Buffer) -> None:
        width = span.dtype_out.bits // 8
        first = span.block_offset + start * width
        raw = self._outs[k][first : first + (stop - start) * width]
        finite = finish(
            sums_B, raw.view(STORAGE[span.dtype_out]), span.dtype_out, divisor=self._recipes[k].divisor
        )
        if not finite and not self._allow_nonfinite:
            raise self._why_not_finite(span, self._recipes[k])

    def _why_not_finite(self, span: Span, recipe: Recipe) -> InputError:
        """Name the checkpoint, tensor and index that made a result not finite."""
        for number, _ in recipe.members:
            for piece in span.pieces:
                found = first_nonfinite(self._readers[number], piece)
                if found is not None:
                    return _nonfinite(piece.tensor, self._readers[number], *found)
        names = ", ".join(printable(piece.tensor) for piece in span.pieces[:3])
        return NonfiniteError(
            f"{names}: the values are finite, but a sum overflows or a mean is too large for "
            f"{span.dtype_out.value[0]}; choose a wider --dtype, or keep infinity with --allow-nonfinite"
        )


def on_pages(count: int, length_bytes: int) -> Buffer:
    """Buffers that begin where pages do: the system copies from a page of a file to there twice as fast as to
    16 bytes later, where numpy's begin.
    """
    memory = mmap.mmap(-1, count * length_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).reshape(count, length_bytes)


def where(segments: Segments, reader: CheckpointReader, cuts: Integers) -> Where:
    """Byte offset in a source of each cut of a span, and the parts of files that hold them: (first cut, cut
    after the last, file, byte offset, length). Near cuts of a file are one part.
    """
    files, file_C, offset_C = segments.places(reader, cuts[:-1])
    end_C = offset_C + np.diff(cuts)
    far_C = (file_C[1:] != file_C[:-1]) | (np.abs(offset_C[1:] - end_C[:-1]) > _NEAR_BYTES)
    edges = [0, *(np.flatnonzero(far_C) + 1).tolist(), len(offset_C)]
    runs = []
    for first, last in pairwise(edges):
        low, high = int(offset_C[first:last].min()), int(end_C[first:last].max())
        runs.append((first, last, files[file_C[first]], low, high - low))
    return offset_C, runs


def load_kernels(types: Iterable[tuple[DType, DType]]) -> None:
    """Compile, or load from the compiler's cache, the loop for each pair of types; else the first block
    would.
    """
    none = np.empty(0, np.int64)
    read_runs(np.int32(0), none, none, none, np.empty(0, np.uint8))
    for dtype_in, dtype_out in types:
        if DType.F16 not in (dtype_in, dtype_out):
            wide = accumulator_dtype(dtype_in)
            read_and_average(
                np.empty((0, 0), np.int32),
                np.empty((0, 0), np.int64),
                none,
                np.empty((0, 0), np.uint8),
                np.empty((0, 0), wide),
                none.astype(wide),
                np.empty((AT_ONCE, 8), STORAGE[dtype_in]),
                np.empty((0, 8), wide),
                np.empty((0, 8), STORAGE[dtype_out]),
                none,
                0,
                StopFlag().memory,
            )


def _members(
    recipes: Sequence[Recipe], needed: Sequence[int], wide: type[np.floating[Any]]
) -> tuple[Buffer, Buffer]:
    """For each merge and each needed reader: whether it is a member, and its weight."""
    members_KN = np.full((len(recipes), len(needed)), ABSENT, np.uint8)
    weights_KN = np.zeros((len(recipes), len(needed)), wide)
    column = {number: n for n, number in enumerate(needed)}
    for k, recipe in enumerate(recipes):
        for position, (number, weight) in enumerate(recipe.members):
            members_KN[k, column[number]] = LATER if position else FIRST
            weights_KN[k, column[number]] = weight
    return members_KN, weights_KN


def first_nonfinite(reader: CheckpointReader, piece: Piece) -> tuple[list[int], float] | None:
    """Index in the tensor and value of the first element of a piece that is not finite."""
    spec = reader.tensors[piece.tensor]
    width = spec.dtype.bits // 8
    raw = np.empty((piece.stop - piece.start) * width, np.uint8)
    runs = reader.runs(piece.tensor, piece.start, piece.stop, piece.box)
    reader.read_many(requests_for(runs, width, view(raw)))
    values = raw.view(STORAGE[spec.dtype])
    if spec.dtype is DType.BF16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    wrong = np.flatnonzero(~np.isfinite(values))
    if not len(wrong):
        return None
    parts = len(values) // (piece.stop - piece.start)
    starts, sizes = piece.box or whole_box(spec.shape)
    inside = np.unravel_index(piece.start + int(wrong[0]) // parts, sizes) if sizes else ()
    index = [start + int(i) for start, i in zip(starts, inside, strict=True)]
    return index, float(values[wrong[0]])


def _nonfinite(tensor: str, reader: CheckpointReader, index: list[int], value: float) -> NonfiniteError:
    return NonfiniteError(
        f"{printable(tensor)}{index} in {read_from(reader, tensor)}: {value}; every value must be finite. "
        "Leave that checkpoint out, or go on regardless with --allow-nonfinite"
    )
