"""Inner products of a plan's checkpoints, group by group of tensors, from one read in bounded memory."""

# N checkpoints, G groups of tensors, B elements of a tile

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.averaging.accumulate import STORAGE
from pma.averaging.inner_products import add_products, load_kernel, read_and_add_products, stretch_of
from pma.averaging.kernels import DONE, STOPPED
from pma.engine import provenance
from pma.engine.blocks import Block, Policy, Span
from pma.engine.compute import MOST_OPEN, first_nonfinite, on_pages, where
from pma.engine.memory_budget import rows_tile_bytes_within
from pma.engine.plan import Plan
from pma.engine.read_ahead import ReadAhead
from pma.engine.reading import MOST_CUTS, SpanReader
from pma.engine.segments import Segments
from pma.engine.stopping import StopFlag
from pma.engine.stream import Progress, forget_what_does_not_fit, in_threads
from pma.engine.work import Work, work_of
from pma.errors import Interrupted, NonfiniteError, printable
from pma.types import DType

Floats = NDArray[np.float64]
_NEAR_BYTES, _PAGE = 2**19, 2**12


@dataclass(frozen=True, kw_only=True, eq=False)
class InnerProducts:
    """Of each of `groups`: how many values it has, the inner products of the checkpoints' deviations from the
    newest (`deviations_GNN`, whose last row and column are zero), those of the newest checkpoint with each
    deviation (`newest_GN`, the last one with itself). Exact to about 1e-7 of the two lengths, of fp64 sources
    to 1e-15; a complex number is two values.
    """

    groups: tuple[str, ...]
    elements_G: NDArray[np.int64]
    deviations_GNN: Floats
    newest_GN: Floats
    bytes_read: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """Of some blocks: lower triangles of inner products, the newest checkpoint itself the last row."""

    gram_GNN: Floats
    bytes_read: int


GroupOf = Callable[[str], str]


def inner_products(plan: Plan, group_of: GroupOf, *, progress: Progress | None = None) -> InnerProducts:
    """Read each averaged tensor of the plan's checkpoints once. `group_of`: a tensor's group, by its name.
    `progress`: told bytes read since the last call, and how many there are to read.

    The plan's weights play no part. Sums are taken in the order in which threads come by, so the last digits
    of fp64 may differ from run to run. Raises NonfiniteError for NaN or infinity, MismatchError where a file
    changed meanwhile.
    """
    return of_sums(plan, group_of, sums_of(plan, group_of, progress=progress))


def bytes_to_read(plan: Plan) -> int:
    """Bytes of all checkpoints together that inner products are of."""
    return plan.bytes_of(Policy.AVERAGE) * len(plan.readers)


def sums_of(
    plan: Plan,
    group_of: GroupOf,
    *,
    numbers: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Sums:
    """What `inner_products` needs of the blocks `numbers`, all by default; the rest as there."""
    groups = _groups(plan, group_of)
    work, count = work_of(plan), len(plan.readers)
    tile_bytes = rows_tile_bytes_within(plan.options.memory_bytes, work.threads, count)
    work = replace(work, tile_bytes=tile_bytes)
    load_kernel({plan.tensors[name].dtype for name in groups})
    stop = StopFlag()
    forget_what_does_not_fit(work.readers)
    blocks = work.blocks if numbers is None else (work.blocks[number] for number in numbers)
    ahead = ReadAhead(work, _averaged_only(blocks), lambda block: [0], stop)
    workers: list[_Worker] = []
    group_count, total = len(set(groups.values())), bytes_to_read(plan)

    def run() -> None:
        worker = _Worker(work, groups, group_count, ahead, stop)
        workers.append(worker)
        worker.run(None if progress is None else lambda read: progress(read, total))

    in_threads(run, work.threads, ahead, stop)
    provenance.check_unchanged(plan)
    return Sums(
        gram_GNN=sum((worker.summed() for worker in workers), np.zeros((group_count, count, count))),
        bytes_read=sum(worker.bytes_read for worker in workers),
    )


def of_sums(plan: Plan, group_of: GroupOf, sums: Sums) -> InnerProducts:
    """What the sums of all blocks come to."""
    groups = _groups(plan, group_of)
    names = tuple(dict.fromkeys(group_of(name) for name in groups))
    elements_G = np.zeros(len(names), np.int64)
    for name, number in groups.items():
        per_element = 2 if plan.tensors[name].dtype is DType.C64 else 1
        elements_G[number] += plan.tensors[name].element_count * per_element
    gram_GNN = np.tril(sums.gram_GNN) + np.tril(sums.gram_GNN, -1).transpose(0, 2, 1)
    newest_GN = gram_GNN[:, -1].copy()
    gram_GNN[:, -1] = gram_GNN[:, :, -1] = 0
    return InnerProducts(
        groups=names,
        elements_G=elements_G,
        deviations_GNN=gram_GNN,
        newest_GN=newest_GN,
        bytes_read=sums.bytes_read,
    )


def _groups(plan: Plan, group_of: GroupOf) -> dict[str, int]:
    """The number of each averaged tensor's group."""
    averaged = [name for name, policy in plan.policies.items() if policy is Policy.AVERAGE]
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(group_of(name), len(numbers)) for name in averaged}


def _averaged_only(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks without what is not averaged: nothing else is to be read."""
    for block in blocks:
        spans = tuple(span for span in block.spans if span.policy is Policy.AVERAGE)
        if spans:
            yield replace(block, spans=spans)


class _Worker:
    """The buffers and sums of one thread."""

    def __init__(
        self, work: Work, numbers: dict[str, int], groups: int, ahead: ReadAhead, stop: StopFlag
    ) -> None:
        self._work, self._numbers, self._ahead, self._stop = work, numbers, ahead, stop
        self._source = SpanReader(work.readers, ahead)
        self._count = len(work.readers)
        even = self._count + self._count % 2
        # so little of each that all of it stays in the second cache between reading and adding
        near_bytes = max(_NEAR_BYTES // self._count // _PAGE * _PAGE, _PAGE)
        self._near = on_pages(self._count, near_bytes)
        self._rows = on_pages(self._count, work.tile_bytes)
        self._stretches: dict[DType, NDArray[Any]] = {}
        self._gram_GNN = np.zeros((groups, even, even))

    def summed(self) -> Floats:
        """What was summed so far, the lower triangles; the newest checkpoint itself is the last row."""
        return self._gram_GNN[:, : self._count, : self._count]

    @property
    def bytes_read(self) -> int:
        """From all sources so far."""
        return self._source.bytes_read

    def run(self, progress: Callable[[int], None] | None) -> None:
        """Take blocks until there are none, or all is called off."""
        while not self._stop.is_set() and (block := self._ahead.next()) is not None:
            before = self.bytes_read
            for index, span in enumerate(block.spans):
                if not self._add_directly(span):
                    self._add(block, index, span)
                if not np.isfinite(self._gram_GNN).all():
                    raise _not_finite(span, self._work)
            if progress is not None:
                progress(self.bytes_read - before)

    def _add_directly(self, span: Span) -> bool:
        """The same as `_add` in one compiled loop; False, and nothing done, where that cannot be."""
        readers = self._work.readers
        if span.dtype_in is DType.F16 or len(readers) > MOST_OPEN:
            return False
        segments = Segments(span)
        cuts = segments.cuts(readers)
        if len(cuts) > MOST_CUTS:
            return False
        alike = {reader.layout_digest: reader for reader in readers}
        found = {digest: where(segments, reader, cuts) for digest, reader in alike.items()}
        places = [found[reader.layout_digest] for reader in readers]
        if sum(len(runs) for _, runs in places) > MOST_OPEN:
            return False
        width, per_element = span.dtype_in.bits // 8, 2 if span.dtype_in is DType.C64 else 1
        descriptors_CN = np.empty((len(cuts) - 1, len(readers)), np.int32)
        edges_E3 = np.array(self._edges(span), np.int64)
        edges_E3[:, 1:] *= per_element
        added_GNN = np.zeros_like(self._gram_GNN)
        with ExitStack() as opened:
            for n, (_, runs) in enumerate(places):
                for first, last, file, offset_bytes, length_bytes in runs:
                    descriptor = readers[n].descriptor(file, offset_bytes, length_bytes)
                    if descriptor is None:
                        return False
                    descriptors_CN[first:last, n] = opened.enter_context(descriptor)
            outcome = read_and_add_products(
                descriptors_CN,
                np.stack([offset_C for offset_C, _ in places], axis=1),
                np.diff(cuts) // width * per_element,
                edges_E3,
                self._near.view(STORAGE[span.dtype_in]),
                self._stretch(span.dtype_in),
                added_GNN,
                self._stop.memory,
            )
        if outcome == STOPPED:
            raise Interrupted("stopped")
        if outcome != DONE:
            return False  # reading again by requests finds out why
        self._gram_GNN += added_GNN
        self._source.bytes_read += span.length_in_bytes * len(readers)
        return True

    def _add(self, block: Block, index: int, span: Span) -> None:
        width = span.dtype_in.bits // 8
        tile_elements = self._work.tile_bytes // width
        segments = Segments(span)
        edges = self._edges(span)
        for start in range(0, span.element_count, tile_elements):
            stop = min(start + tile_elements, span.element_count)
            for number, row in enumerate(self._rows):
                if self._stop.is_set():
                    raise Interrupted("stopped")
                into = row[: (stop - start) * width]
                self._source.read(block, index, segments, number, start * width, into)
            rows_NB = self._values(span.dtype_in, (stop - start) * width)
            per_element = 2 if span.dtype_in is DType.C64 else 1
            for group, low, high in edges:
                low, high = max(low, start) - start, min(high, stop) - start
                if low < high:
                    add_products(
                        rows_NB,
                        low * per_element,
                        high * per_element,
                        self._count,
                        self._stretch(span.dtype_in),
                        self._gram_GNN[group],
                    )

    def _stretch(self, dtype: DType) -> NDArray[Any]:
        if dtype not in self._stretches:
            self._stretches[dtype] = stretch_of(dtype, self._count)
        return self._stretches[dtype]

    def _values(self, dtype: DType, length_bytes: int) -> NDArray[Any]:
        rows_NB = self._rows[:, :length_bytes].view(STORAGE[dtype])
        return rows_NB.astype(np.float32) if dtype is DType.F16 else rows_NB

    def _edges(self, span: Span) -> list[tuple[int, int, int]]:
        """(group, first element, element after the last) of the span; neighbours of a group are one."""
        edges: list[tuple[int, int, int]] = []
        position = 0
        for piece in span.pieces:
            group, end = self._numbers[piece.tensor], position + piece.stop - piece.start
            if edges and edges[-1][0] == group:
                edges[-1] = (group, edges[-1][1], end)
            else:
                edges.append((group, position, end))
            position = end
        return edges


def _not_finite(span: Span, work: Work) -> NonfiniteError:
    for reader in work.readers:
        for piece in span.pieces:
            found = first_nonfinite(reader, piece)
            if found is not None:
                index, value = found
                return NonfiniteError(
                    f"{printable(piece.tensor)}{index} in {reader.path}: {value}; every value must be "
                    "finite. Leave that checkpoint out, or the tensor with --exclude"
                )
    names = ", ".join(printable(piece.tensor) for piece in span.pieces[:3])
    return NonfiniteError(
        f"{names}: values whose squares overflow fp64 have no distance; leave them out with --exclude"
    )
