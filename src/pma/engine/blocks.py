"""Cutting an output into blocks: aligned ranges of its files, each made and digested in one piece.

A block is one digest chunk, so that its digest is computed while its bytes are in cache, whoever wrote it and
in whatever order. Inside it, neighbouring tensors treated alike form one span and are computed at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import overload

from pma.types import Box, DType, Fragment, Layout, OutputFile, TensorSpec

CHUNK_BYTES = 4 * 2**20


class Policy(Enum):
    """What happens to a tensor."""

    AVERAGE = "average"
    COPY_NEWEST = "copy newest"
    ZERO = "zero"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements `start` to `stop`, row-major in `box` of a tensor (None: in all of it), at `block_offset`
    bytes of its block.
    """

    tensor: str
    start: int
    stop: int
    block_offset: int
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring pieces of one policy and one pair of types, `length_bytes` from `block_offset`."""

    policy: Policy
    dtype_in: DType
    dtype_out: DType
    block_offset: int
    length_bytes: int
    pieces: tuple[Piece, ...]

    @property
    def element_count(self) -> int:
        return self.length_bytes * 8 // self.dtype_out.bits

    @property
    def length_in_bytes(self) -> int:
        """Bytes of the span in a source."""
        return self.element_count * self.dtype_in.bits // 8


@dataclass(frozen=True, kw_only=True)
class Block:
    """`length_bytes` of an output file from `offset_bytes`: constants (offset in the block, bytes) and
    spans.
    """

    file: str
    offset_bytes: int
    length_bytes: int
    constants: tuple[tuple[int, bytes], ...]
    spans: tuple[Span, ...]

    @property
    def chunk(self) -> tuple[str, int]:
        """File and number of its digest chunk."""
        return self.file, self.offset_bytes // CHUNK_BYTES


class Blocks(Sequence[Block]):
    """The blocks of every output file, in order, each made when asked for: terabytes have a quarter of a
    million.
    """

    def __init__(
        self, layout: Layout, sources: Mapping[str, TensorSpec], policies: Mapping[str, Policy]
    ) -> None:
        """`sources` tells each tensor's type in the checkpoints."""
        self._layout, self._sources, self._policies = layout, sources, policies
        self._firsts: list[int] = []  # number of each file's first block
        self._count = 0
        for file in layout.files:
            self._firsts.append(self._count)
            self._count += -(-file.size_bytes // CHUNK_BYTES)
        self._sorted: dict[str, _Sorted] = {}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        number = bisect_right(self._firsts, index) - 1
        file = self._layout.files[number]
        start = (index - self._firsts[number]) * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, file.size_bytes)
        inside = self._by_offset(file)
        fragments = [f for f in inside.fragments_in(start, stop) if f.offset_bytes + f.length_bytes > start]
        constants = []
        for offset, data in inside.constants_in(start, stop):
            low, high = max(offset, start), min(offset + len(data), stop)
            if low < high:
                constants.append((low - start, data[low - offset : high - offset]))
        spans = _spans(start, stop, fragments, self._layout.tensors, self._sources, self._policies)
        return Block(
            file=file.name,
            offset_bytes=start,
            length_bytes=stop - start,
            constants=tuple(constants),
            spans=spans,
        )

    def files(self, first: int, last: int) -> list[str]:
        """Names of the files that blocks `first` to `last` lie in."""
        low, high = (bisect_right(self._firsts, number) - 1 for number in (first, last))
        return [file.name for file in self._layout.files[low : high + 1]]

    def file_of(self, number: int) -> str:
        """Name of the file that block `number` lies in."""
        return self._layout.files[bisect_right(self._firsts, number) - 1].name

    def chunk_of(self, number: int) -> tuple[str, int]:
        """`chunk` of block `number`, without making it."""
        file = bisect_right(self._firsts, number) - 1
        return self._layout.files[file].name, number - self._firsts[file]

    def averaged_types(self) -> set[tuple[DType, DType]]:
        """Types in the sources and in the output, of what is averaged."""
        averaged = [name for name, policy in self._policies.items() if policy is Policy.AVERAGE]
        return {(self._sources[name].dtype, self._layout.tensors[name].dtype) for name in averaged}

    def _by_offset(self, file: OutputFile) -> _Sorted:
        if file.name not in self._sorted:
            self._sorted[file.name] = _Sorted(file)
        return self._sorted[file.name]


class _Sorted:
    """What a file holds, by where it begins: a file may have tens of thousands of either kind."""

    def __init__(self, file: OutputFile) -> None:
        self._fragments = sorted((f for f in file.fragments if f.length_bytes), key=lambda f: f.offset_bytes)
        self._fragment_starts = [f.offset_bytes for f in self._fragments]
        self._constants = sorted(file.constants, key=lambda constant: constant[0])
        self._constant_starts = [offset for offset, _ in self._constants]

    def fragments_in(self, start: int, stop: int) -> Sequence[Fragment]:
        """Those that begin before `stop`, from the last that begins no later than `start`."""
        return self._fragments[_between(self._fragment_starts, start, stop)]

    def constants_in(self, start: int, stop: int) -> Sequence[tuple[int, bytes]]:
        """As for fragments."""
        return self._constants[_between(self._constant_starts, start, stop)]


def _between(starts: Sequence[int], start: int, stop: int) -> slice:
    return slice(max(bisect_right(starts, start) - 1, 0), bisect_right(starts, stop - 1))


def _spans(
    start: int,
    stop: int,
    fragments: Sequence[Fragment],
    outputs: Mapping[str, TensorSpec],
    sources: Mapping[str, TensorSpec],
    policies: Mapping[str, Policy],
) -> tuple[Span, ...]:
    """Neighbours among `fragments`, cut to bytes `start` to `stop` of their file, that are treated alike."""
    groups: list[tuple[tuple[Policy, DType, DType], list[Piece]]] = []
    end = 0
    for fragment in fragments:
        policy = policies[fragment.tensor]
        dtypes = sources[fragment.tensor].dtype, outputs[fragment.tensor].dtype
        low = max(fragment.offset_bytes, start)
        high = min(fragment.offset_bytes + fragment.length_bytes, stop)
        width, first = max(dtypes[1].bits // 8, 1), fragment.flat_start or 0
        piece = Piece(
            tensor=fragment.tensor,
            start=first + (low - fragment.offset_bytes) // width,
            stop=first + (high - fragment.offset_bytes) // width,
            block_offset=low - start,
            box=fragment.box,
        )
        kind = (policy, *dtypes)
        if not groups or groups[-1][0] != kind or end != low:
            groups.append((kind, []))
        groups[-1][1].append(piece)
        end = high
    return tuple(_span(kind, pieces) for kind, pieces in groups)


def _span(kind: tuple[Policy, DType, DType], pieces: Sequence[Piece]) -> Span:
    policy, dtype_in, dtype_out = kind
    return Span(
        policy=policy,
        dtype_in=dtype_in,
        dtype_out=dtype_out,
        block_offset=pieces[0].block_offset,
        length_bytes=sum(piece.stop - piece.start for piece in pieces) * max(dtype_out.bits // 8, 1),
        pieces=tuple(pieces),
    )
