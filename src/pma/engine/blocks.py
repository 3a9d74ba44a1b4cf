"""Cutting an output into blocks: aligned ranges of its files, each made and digested in one piece.

A block is a whole number of digest chunks, so that digests are computed while its bytes are in cache, whoever
wrote the block and in whatever order. Inside it, neighbouring tensors treated alike form one span and are
computed at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from pma.errors import UsageError
from pma.quantities import bytes_text
from pma.types import DType, Fragment, Layout, OutputFile, TensorSpec

CHUNK_BYTES = 4 * 2**20
_LARGEST_BLOCK_BYTES = 2 * CHUNK_BYTES


class Policy(Enum):
    """What happens to a tensor."""

    AVERAGE = "average"
    COPY_NEWEST = "copy newest"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements `start` to `stop` of a tensor, at `block_offset` bytes of its block. A copied piece counts
    bytes.
    """

    tensor: str
    start: int
    stop: int
    block_offset: int


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


def block_bytes_within(memory_bytes: int, threads: int, worst_ratio: float) -> int:
    """The block length that keeps `threads` workers within `memory_bytes`. Raises UsageError where none does.

    `worst_ratio`: bytes of buffers a block needs for one byte of output.
    """
    room = int(memory_bytes / (threads * worst_ratio))
    if room < CHUNK_BYTES:
        needed = int(CHUNK_BYTES * threads * worst_ratio)
        raise UsageError(
            f"--memory {bytes_text(memory_bytes)} is too little for {threads} threads, which need "
            f"{bytes_text(needed)}; give more, or fewer --threads"
        )
    return min(_LARGEST_BLOCK_BYTES, room // CHUNK_BYTES * CHUNK_BYTES)


def buffer_ratio(dtype_in: DType, dtype_out: DType) -> float:
    """Bytes of buffers for one byte of output: the output, the values as read, the accumulator."""
    accumulator_bits = 32 if dtype_in.bits <= 16 else 64
    return 1 + (dtype_in.bits + accumulator_bits) / dtype_out.bits


def cut(
    layout: Layout, sources: Mapping[str, TensorSpec], policies: Mapping[str, Policy], block_bytes: int
) -> Iterator[Block]:
    """The blocks of every output file, in order. `sources` tells each tensor's type in the checkpoints."""
    for file in layout.files:
        items = sorted(
            (f for f in file.fragments if f.length_bytes), key=lambda fragment: fragment.offset_bytes
        )
        first = 0
        for start in range(0, file.size_bytes, block_bytes):
            stop = min(start + block_bytes, file.size_bytes)
            while first < len(items) and items[first].offset_bytes + items[first].length_bytes <= start:
                first += 1
            inside = []
            for fragment in items[first:]:
                if fragment.offset_bytes >= stop:
                    break
                inside.append(fragment)
            yield _block(file, start, stop, inside, layout.tensors, sources, policies)


def _block(
    file: OutputFile,
    start: int,
    stop: int,
    fragments: Sequence[Fragment],
    outputs: Mapping[str, TensorSpec],
    sources: Mapping[str, TensorSpec],
    policies: Mapping[str, Policy],
) -> Block:
    constants = []
    for offset, data in file.constants:
        low, high = max(offset, start), min(offset + len(data), stop)
        if low < high:
            constants.append((low - start, data[low - offset : high - offset]))
    groups: list[tuple[tuple[Policy, DType, DType], list[Piece]]] = []
    end = 0
    for fragment in fragments:
        policy = policies[fragment.tensor]
        dtypes = sources[fragment.tensor].dtype, outputs[fragment.tensor].dtype
        low = max(fragment.offset_bytes, start)
        high = min(fragment.offset_bytes + fragment.length_bytes, stop)
        unit = 1 if policy is Policy.COPY_NEWEST else dtypes[1].bits // 8
        piece = Piece(
            tensor=fragment.tensor,
            start=(low - fragment.offset_bytes) // unit,
            stop=(high - fragment.offset_bytes) // unit,
            block_offset=low - start,
        )
        kind = (policy, *dtypes)
        if not groups or groups[-1][0] != kind or end != low:
            groups.append((kind, []))
        groups[-1][1].append(piece)
        end = high
    spans = [_span(kind, pieces) for kind, pieces in groups]
    return Block(
        file=file.name,
        offset_bytes=start,
        length_bytes=stop - start,
        constants=tuple(constants),
        spans=tuple(spans),
    )


def _span(kind: tuple[Policy, DType, DType], pieces: Sequence[Piece]) -> Span:
    policy, dtype_in, dtype_out = kind
    unit = 1 if policy is Policy.COPY_NEWEST else dtype_out.bits // 8
    return Span(
        policy=policy,
        dtype_in=dtype_in,
        dtype_out=dtype_out,
        block_offset=pieces[0].block_offset,
        length_bytes=sum(piece.stop - piece.start for piece in pieces) * unit,
        pieces=tuple(pieces),
    )
