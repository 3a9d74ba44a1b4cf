"""The blocks of a merge shared out among processes: equal bytes to move, few files in more than one part."""

# B blocks, F files, P parts

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from pma.engine.blocks import CHUNK_BYTES, Policy
from pma.types import Layout, OutputFile, TensorSpec

Integers = NDArray[np.int64]

# a cut goes to where a file ends if that moves it by no more than this share of a part
_NEAR = 1 / 64


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a merge's blocks, by number, in ascending order, and the bytes that are moved for them."""

    ranges: tuple[range, ...]
    bytes_to_read: int
    bytes_to_write: int

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self.ranges)

    def __len__(self) -> int:
        return sum(map(len, self.ranges))


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockBytes:
    """What each block moves: `read_B`, `write_B`. `first_F`: the number of each file's first block, and at
    the end how many blocks there are.
    """

    read_B: Integers
    write_B: Integers
    first_F: Integers

    def without(self, done_B: Collection[int]) -> BlockBytes:
        """The same where some blocks, given by number, move nothing any more."""
        missing_B = np.ones(len(self.read_B), np.int64)
        missing_B[list(done_B)] = 0
        return BlockBytes(
            read_B=self.read_B * missing_B, write_B=self.write_B * missing_B, first_F=self.first_F
        )


def block_bytes(
    layout: Layout, sources: Mapping[str, TensorSpec], policies: Mapping[str, Policy], checkpoints: int
) -> BlockBytes:
    """What each block of an output moves, from the places of tensors alone: no block is made.

    `sources` tells each tensor's type in the checkpoints, of which there are so many.
    """
    times = {Policy.AVERAGE: checkpoints, Policy.COPY_NEWEST: 1, Policy.ZERO: 0}
    rates = {
        name: times[policy] * sources[name].dtype.bits / layout.tensors[name].dtype.bits
        for name, policy in policies.items()
    }
    edges = [_edges(file) for file in layout.files]
    counts = [len(edge_B) - 1 for edge_B in edges]
    read = [_read_before(file, edge_B, rates) for file, edge_B in zip(layout.files, edges, strict=True)]
    none: list[Integers] = [np.zeros(0, np.int64)]
    return BlockBytes(
        read_B=np.concatenate([*none, *(np.diff(np.rint(r).astype(np.int64)) for r in read)]),
        write_B=np.concatenate([*none, *(np.diff(edge_B) for edge_B in edges)]),
        first_F=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
    )


def _edges(file: OutputFile) -> Integers:
    """Where the blocks of a file begin, and its end."""
    return np.append(np.arange(0, file.size_bytes, CHUNK_BYTES, dtype=np.int64), file.size_bytes)


def _read_before(file: OutputFile, edge_B: Integers, rates: Mapping[str, float]) -> NDArray[np.float64]:
    """Bytes of all sources that are read for what lies in a file before each of its edges."""
    fragments = sorted((f for f in file.fragments if f.length_bytes), key=lambda f: f.offset_bytes)
    places, totals, total = [0.0], [0.0], 0.0
    for fragment in fragments:
        places.append(fragment.offset_bytes)
        totals.append(total)
        total += fragment.length_bytes * rates[fragment.tensor]
        places.append(fragment.offset_bytes + fragment.length_bytes)
        totals.append(total)
    return np.interp(edge_B, places, totals)


def partition(moved: BlockBytes, parts: int, *, whole_files: bool = False) -> list[Part]:
    """Every block that moves anything, in exactly one of `parts` parts, of which some may be empty.

    A part is neighbours in the order of files, so that files and parts overlap in at most files + parts - 1
    places, and moves its share within a block's bytes and a thirty-second. With `whole_files` a file
    belongs to one part, as where one process has to write all of it, and balance is what that allows.
    """
    assert parts > 0
    ranges = _by_file(moved, parts) if whole_files else _in_order(moved, parts)
    return [_part(moved, mine) for mine in ranges]


def _in_order(moved: BlockBytes, parts: int) -> list[list[range]]:
    before_B = np.concatenate([[0], np.cumsum(moved.read_B + moved.write_B)])
    share = before_B[-1] / parts
    cuts = [0, *(_cut(before_B, moved.first_F, part * share, _NEAR * share) for part in range(1, parts))]
    return [[range(*pair)] for pair in pairwise([*cuts, len(moved.read_B)])]


def _cut(before_B: Integers, first_F: Integers, target: float, near: float) -> int:
    """The block to begin a part with where `target` bytes shall come before it."""
    at_file = first_F[_nearest(before_B[first_F], target)]
    if abs(before_B[at_file] - target) <= near:
        return int(at_file)
    return _nearest(before_B, target)


def _nearest(ascending: Integers, target: float) -> int:
    after = min(int(np.searchsorted(ascending, target)), len(ascending) - 1)
    before = max(after - 1, 0)
    return before if target - ascending[before] < ascending[after] - target else after


def _by_file(moved: BlockBytes, parts: int) -> list[list[range]]:
    """The largest file first, each to the part that has least."""
    ranges = [range(int(first), int(stop)) for first, stop in pairwise(moved.first_F)]
    cost_F = [int((moved.read_B + moved.write_B)[mine.start : mine.stop].sum()) for mine in ranges]
    least = [(0, part) for part in range(parts)]
    given: list[list[range]] = [[] for _ in range(parts)]
    for file in sorted(range(len(ranges)), key=lambda file: -cost_F[file]):
        cost, part = heapq.heappop(least)
        given[part].append(ranges[file])
        heapq.heappush(least, (cost + cost_F[file], part))
    return [sorted(mine, key=lambda one: one.start) for mine in given]


def _part(moved: BlockBytes, ranges: Sequence[range]) -> Part:
    def total(bytes_B: Integers, mine: range) -> int:
        return int(bytes_B[mine.start : mine.stop].sum())

    # a block has at least a byte: where none is to be written, all are done
    kept = tuple(mine for mine in ranges if total(moved.write_B, mine))
    return Part(
        ranges=kept,
        bytes_to_read=sum(total(moved.read_B, mine) for mine in kept),
        bytes_to_write=sum(total(moved.write_B, mine) for mine in kept),
    )
