"""What a checkpoint format gives the rest of PMA: a reader, a writer, and `detect(path)`.

A format is one module with `detect`, `open_reader` and (where it can be written) a writer. The conformance
suites in `pma.testing` hold each of them to what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

from pma.types import CheckpointMeta, FileIdentity, Fragment, Layout, TensorSpec

#: how the name of a folder ends whose output is not finished; nothing in it counts as a checkpoint
UNFINISHED_SUFFIX = ".pma-partial"


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """`len(into)` bytes of `file` from `offset_bytes`, into a writable buffer."""

    file: str
    offset_bytes: int
    into: memoryview


class CheckpointReader(Protocol):
    """Named tensors of one checkpoint, read by position. Opening reads headers only; every method is
    thread-safe.
    """

    format: str
    path: Path
    request_bytes: int
    requests_in_flight: int
    #: files beside the checkpoint's own that hold tensors too and are not part of it; a plan shows them
    ignored_files: tuple[str, ...]
    #: the same for two readers only if every tensor lies alike in files of the same names
    layout_digest: str
    #: set to leave no page of what was read in the system's cache, where the reader can
    forget_after_reading: bool

    @property
    def meta(self) -> CheckpointMeta:
        """What the checkpoint's own records say of step, tokens and learning rate."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every stored tensor, in the order of the format."""

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        """How tensor `name` lies on disk: fragments that cover each of its elements exactly once."""

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer, coalescing neighbours. Raises IncompleteError where a file is shorter than it
        was.
        """

    def descriptor(self, file: str) -> AbstractContextManager[int] | None:
        """A local file of the checkpoint, open for reading by position in the block; None where there is
        none.
        """

    def identities(self) -> tuple[FileIdentity, ...]:
        """Size, time and header digest of each file, as they are now."""

    def close(self) -> None:
        """Release open files; the reader is not used again."""


class PartWriter(Protocol):
    """One process's hand on an output that others may write parts of at the same time."""

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        """Put bytes at a known place, in any order, from any thread."""

    def sync(self) -> None:
        """Make everything written through this part so far durable."""

    def close(self) -> None:
        """Let go of the files; what was not synced may be lost."""


class CheckpointWriter(Protocol):
    """Writes one checkpoint into a folder that nobody else reads yet."""

    def create(self, layout: Layout) -> None:
        """Make every file at its full size, so that a full disk is found before the work. Files that have it
        already keep their bytes. Raises SpaceError.
        """

    def open_part(self) -> PartWriter:
        """A handle to write fragments through."""

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file that is copied unopened."""

    def finish(self) -> None:
        """Write indexes; everything is durable afterwards."""


def range_requests(
    spec: TensorSpec, fragments: Sequence[Fragment], start: int, stop: int, into: memoryview
) -> Iterator[ReadRequest]:
    """Requests that fill `into` with elements `start` to `stop` (row-major) of a tensor, however it lies
    on disk.
    """
    element_bytes = spec.dtype.bits // 8
    for first, count, file, offset_bytes in stored_runs(spec, fragments, start, stop):
        low = (first - start) * element_bytes
        part = into[low : low + count * element_bytes]
        yield ReadRequest(file=file, offset_bytes=offset_bytes, into=part)


def stored_runs(
    spec: TensorSpec, fragments: Sequence[Fragment], start: int, stop: int
) -> Iterator[tuple[int, int, str, int]]:
    """Where elements `start` to `stop` of a tensor lie: (first element, count, file, byte offset) of each
    run.
    """
    element_bytes = spec.dtype.bits // 8
    for fragment in fragments:
        for run_start, run_length, offset_bytes in _runs(spec, fragment, element_bytes):
            first, last = max(start, run_start), min(stop, run_start + run_length)
            if first < last:
                offset = offset_bytes + (first - run_start) * element_bytes
                yield first, last - first, fragment.file, offset


def _runs(spec: TensorSpec, fragment: Fragment, element_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first element in the tensor, length in elements, file offset) of each contiguous run of a fragment."""
    if fragment.flat_start is not None:
        yield fragment.flat_start, fragment.length_bytes // element_bytes, fragment.offset_bytes
        return
    assert fragment.box is not None
    starts, sizes = fragment.box
    # trailing dimensions that the box spans whole belong to one run
    split = len(sizes)
    while split > 0 and sizes[split - 1] == spec.shape[split - 1]:
        split -= 1
    split = max(split - 1, 0)
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * spec.shape[axis + 1]
    run_length = 1
    for size in sizes[split:]:
        run_length *= size
    base = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    rows = product(*(range(size) for size in sizes[:split]))
    for position, row in enumerate(rows):
        first = base + sum(index * stride for index, stride in zip(row, strides, strict=False))
        yield first, run_length, fragment.offset_bytes + position * run_length * element_bytes
