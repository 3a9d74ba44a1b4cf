"""One block of one or several merges from their sources, in memory: read once, add to each merge's
accumulator in checkpoint order, divide once, cast once.
"""

# N checkpoints, K merges, B elements of a tile

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.averaging import AT_ONCE
from pma.averaging.accumulate import STORAGE, accumulator_dtype, add, finish
from pma.averaging.kernels import ABSENT, FIRST, LATER, NOT_FINITE, READ_FAILED, STOPPED, read_and_average
from pma.engine.blocks import CHUNK_BYTES, Block, Piece, Policy, Span
from pma.engine.segments import Segments
from pma.engine.stopping import StopFlag
from pma.engine.work import Recipe
from pma.errors import InputError, Interrupted, NonfiniteError, printable
from pma.formats.contracts import CheckpointReader, ReadRequest, range_requests
from pma.types import DType, TensorSpec

Buffer = NDArray[Any]

# sources that the compiled loop holds open at once; systems allow a process 1024 files or fewer
_MOST_OPEN = 64


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
    ) -> None:
        self._readers, self._recipes = readers, recipes
        self._tile_bytes = tile_bytes
        self._allow_nonfinite = allow_nonfinite
        self._stop = stop or StopFlag()
        self._rows = on_pages(AT_ONCE, tile_bytes)
        self._sums = on_pages(len(recipes), 2 * tile_bytes)
        self._outs = on_pages(len(recipes), CHUNK_BYTES)
        self.bytes_read = 0

    def make(self, block: Block, wanted: Sequence[int] | None = None) -> list[tuple[int, memoryview]]:
        """The block's bytes of each wanted merge (all by default), valid until the next call.

        Raises NonfiniteError for a value that is not finite, Interrupted where `stop` was set.
        """
        wanted = range(len(self._recipes)) if wanted is None else wanted
        for k in wanted:
            for offset, data in block.constants:
                self._outs[k][offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        for span in block.spans:
            if span.policy is Policy.AVERAGE:
                if not self._average_directly(span, wanted):
                    self._average(span, wanted)
            else:
                for k in wanted:
                    self._copy(span, self._readers[self._recipes[k].newest], self._outs[k])
        return [(k, _view(self._outs[k][: block.length_bytes])) for k in wanted]

    def _copy(self, span: Span, newest: CheckpointReader, out: Buffer) -> None:
        requests: list[ReadRequest] = []
        for piece in span.pieces:
            spec = newest.tensors[piece.tensor]
            as_bytes = TensorSpec(name=spec.name, dtype=DType.U8, shape=(spec.length_bytes,))
            into = _view(out[piece.block_offset : piece.block_offset + piece.stop - piece.start])
            requests += _requests(newest, as_bytes, piece, into)
        newest.read_many(requests)
        self.bytes_read += span.length_bytes
        if span.dtype_in in STORAGE and not self._allow_nonfinite:
            for piece in span.pieces:
                self._check_copied(piece, newest)

    def _check_copied(self, piece: Piece, newest: CheckpointReader) -> None:
        """A copied tensor may hold NaN no more than an averaged one. It is read again in whole elements."""
        width = newest.tensors[piece.tensor].dtype.bits // 8
        whole = Piece(
            tensor=piece.tensor,
            start=piece.start // width,
            stop=-(-piece.stop // width),
            block_offset=piece.block_offset,
        )
        found = _first_nonfinite(newest, whole)
        if found is not None:
            raise _nonfinite(piece.tensor, newest, *found)

    def _average_directly(self, span: Span, wanted: Sequence[int]) -> bool:
        """The same as `_average` in one compiled loop; False where that cannot do it, or failed to read."""
        if DType.F16 in (span.dtype_in, span.dtype_out):
            return False
        needed = sorted({number for k in wanted for number, _ in self._recipes[k].members})
        if len(needed) > _MOST_OPEN:
            return False
        width = span.dtype_in.bits // 8
        storage, wide = STORAGE[span.dtype_in], accumulator_dtype(span.dtype_in)
        with ExitStack() as opened:
            places = self._places(span, [self._readers[number] for number in needed], opened)
            if places is None:
                return False
            members_KN, weights_KN = _members([self._recipes[k] for k in wanted], needed, wide)
            per_element = 2 if span.dtype_in is DType.C64 else 1
            outcome = read_and_average(
                np.array([descriptor for descriptor, _ in places], np.int32),
                np.array([offset for _, offset in places], np.int64),
                members_KN,
                weights_KN,
                np.array([self._recipes[k].divisor or 1 for k in wanted], wide),
                self._rows.view(storage),
                self._sums.view(wide),
                self._outs.view(STORAGE[span.dtype_out]),
                np.array(wanted, np.int64),
                span.block_offset * 8 // span.dtype_out.bits * per_element,
                span.element_count * per_element,
                self._stop.memory,
            )
        if outcome == STOPPED:
            raise Interrupted("stopped")
        if outcome == NOT_FINITE and not self._allow_nonfinite:
            return False  # slowly, and it will say where
        self.bytes_read += span.element_count * width * len(needed) if outcome != READ_FAILED else 0
        return bool(outcome != READ_FAILED)

    def _places(
        self, span: Span, readers: Sequence[CheckpointReader], opened: ExitStack
    ) -> list[tuple[int, int]] | None:
        """Descriptor and byte offset of the span in each source, if it lies in one piece of a local file in
        all.
        """
        segments, places = Segments(span), []
        for reader in readers:
            place = segments.whole(reader)
            descriptor = reader.descriptor(place[0]) if place is not None else None
            if place is None or descriptor is None:
                return None
            places.append((opened.enter_context(descriptor), place[1]))
        return places

    def _average(self, span: Span, wanted: Sequence[int]) -> None:
        width = span.dtype_in.bits // 8
        tile_elements = self._tile_bytes // width
        segments = Segments(span)
        storage = STORAGE[span.dtype_in]
        wide = accumulator_dtype(span.dtype_in)
        for start in range(0, span.element_count, tile_elements):
            stop = min(start + tile_elements, span.element_count)
            rows = [row[: (stop - start) * width].view(storage) for row in self._rows]
            count = len(rows[0])  # a complex number counts twice
            sums_K = {k: self._sums[k].view(wide)[:count] for k in wanted}
            begun: set[int] = set()
            for numbers in self._groups(wanted):
                for row, number in zip(self._rows, numbers, strict=False):
                    if self._stop.is_set():
                        raise Interrupted("stopped")
                    reader = self._readers[number]
                    reader.read_many(segments.requests(reader, start * width, stop * width, _view(row)))
                    self.bytes_read += (stop - start) * width
                for k in wanted:
                    members = [(numbers.index(n), w) for n, w in self._recipes[k].members if n in numbers]
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
                found = _first_nonfinite(self._readers[number], piece)
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


def load_kernels(types: Iterable[tuple[DType, DType]]) -> None:
    """Compile, or load from the compiler's cache, the loop for each pair of types; else the first block
    would.
    """
    none = np.empty(0, np.int64)
    for dtype_in, dtype_out in types:
        if DType.F16 not in (dtype_in, dtype_out):
            wide = accumulator_dtype(dtype_in)
            read_and_average(
                none.astype(np.int32),
                none,
                np.empty((0, 0), np.uint8),
                np.empty((0, 0), wide),
                none.astype(wide),
                np.empty((AT_ONCE, 8), STORAGE[dtype_in]),
                np.empty((0, 8), wide),
                np.empty((0, 8), STORAGE[dtype_out]),
                none,
                0,
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


def _first_nonfinite(reader: CheckpointReader, piece: Piece) -> tuple[int, float] | None:
    """Index in the tensor and value of the first element of a piece that is not finite."""
    spec = reader.tensors[piece.tensor]
    raw = np.empty((piece.stop - piece.start) * spec.dtype.bits // 8, np.uint8)
    reader.read_many(_requests(reader, spec, piece, _view(raw)))
    values = raw.view(STORAGE[spec.dtype])
    if spec.dtype is DType.BF16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    wrong = np.flatnonzero(~np.isfinite(values))
    if not len(wrong):
        return None
    parts = len(values) // (piece.stop - piece.start)
    return piece.start + int(wrong[0]) // parts, float(values[wrong[0]])


def _nonfinite(tensor: str, reader: CheckpointReader, flat: int, value: float) -> NonfiniteError:
    shape = reader.tensors[tensor].shape
    index = [int(i) for i in np.unravel_index(flat, shape)] if shape else []
    return NonfiniteError(
        f"{printable(tensor)}{index} in {reader.path}: {value}; every value must be finite. "
        "Leave that checkpoint out, or go on regardless with --allow-nonfinite"
    )


def _requests(
    reader: CheckpointReader, spec: TensorSpec, piece: Piece, into: memoryview
) -> list[ReadRequest]:
    return list(range_requests(spec, reader.fragments(piece.tensor), piece.start, piece.stop, into))


def _view(raw: Buffer) -> memoryview:
    return memoryview(raw)  # type: ignore[arg-type]  # numpy's stubs for 3.11 do not say it is a buffer
