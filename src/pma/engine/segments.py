"""Where a span's bytes lie in a source: found once for sources that are laid out alike, then cut for each
tile.
"""

# R runs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pma.engine.blocks import Span
from pma.formats.contracts import CheckpointReader, ReadRequest
from pma.formats.runs import Integers


@dataclass(frozen=True, kw_only=True, eq=False)
class _Segments:
    """Contiguous bytes of a source: where in the span they go, and where they lie. Ascending, without
    neighbours that could be one.
    """

    files: tuple[str, ...]
    start_R: Integers
    length_R: Integers
    file_R: Integers
    offset_R: Integers


class Segments:
    """A span's place in every source that is asked for."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._known: dict[str, _Segments] = {}

    def cuts(self, readers: Sequence[CheckpointReader]) -> Integers:
        """Bytes of the span at which a segment of any of the sources begins, and its end; ascending."""
        alike = {reader.layout_digest: reader for reader in readers}.values()
        starts = [self._of(reader).start_R for reader in alike]
        return np.unique(np.concatenate([*starts, [0, self._span.length_in_bytes]]))

    def places(
        self, reader: CheckpointReader, starts_C: Integers
    ) -> tuple[tuple[str, ...], Integers, Integers]:
        """Where in a source the span's bytes from each of `starts_C` lie: files, number of the file, byte
        offset.
        """
        found = self._of(reader)
        r_C = np.searchsorted(found.start_R, starts_C, side="right") - 1
        return found.files, found.file_R[r_C], found.offset_R[r_C] + starts_C - found.start_R[r_C]

    def requests(
        self, reader: CheckpointReader, start: int, stop: int, into: memoryview
    ) -> list[ReadRequest]:
        """Requests that fill `into` with bytes `start` to `stop` of the span."""
        found = self._of(reader)
        columns = self._between(found, start, stop)
        return [
            ReadRequest(file=found.files[file], offset_bytes=offset, into=into[place : place + length])
            for file, place, length, offset in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def runs(
        self, reader: CheckpointReader, start: int, stop: int
    ) -> list[tuple[str, Integers, Integers, Integers]]:
        """The same by file, as arrays: places counted from `start`, lengths and offsets, in bytes."""
        found = self._of(reader)
        file_R, place_R, length_R, offset_R = self._between(found, start, stop)
        chosen = [(found.files[file], file_R == file) for file in np.unique(file_R)]
        return [(file, place_R[mine], length_R[mine], offset_R[mine]) for file, mine in chosen]

    def count(self, reader: CheckpointReader) -> int:
        """In how many pieces the whole span lies."""
        return len(self._of(reader).start_R)

    def _between(
        self, found: _Segments, start: int, stop: int
    ) -> tuple[Integers, Integers, Integers, Integers]:
        """Segments cut to bytes `start` to `stop` of the span: file, place from `start`, length, offset."""
        first = max(int(np.searchsorted(found.start_R, start, side="right")) - 1, 0)
        inside = slice(first, int(np.searchsorted(found.start_R, stop, side="left")))
        begin_R = found.start_R[inside]
        low_R = np.maximum(begin_R, start)
        high_R = np.minimum(begin_R + found.length_R[inside], stop)
        return found.file_R[inside], low_R - start, high_R - low_R, found.offset_R[inside] + low_R - begin_R

    def _of(self, reader: CheckpointReader) -> _Segments:
        if reader.layout_digest not in self._known:
            self._known[reader.layout_digest] = self._found(reader)
        return self._known[reader.layout_digest]

    def _found(self, reader: CheckpointReader) -> _Segments:
        width = self._span.dtype_in.bits // 8
        files: dict[str, int] = {}
        starts, counts, numbers, offsets = [], [], [], []
        position = 0  # of the piece in the span, in elements
        for piece in self._span.pieces:
            runs = reader.runs(piece.tensor, piece.start, piece.stop, piece.box)
            renumbered = np.array([files.setdefault(file, len(files)) for file in runs.files], np.int64)
            starts.append((position + runs.first_R) * width)
            counts.append(runs.count_R * width)
            numbers.append(renumbered[runs.file_R])
            offsets.append(runs.offset_R)
            position += piece.stop - piece.start
        return _joined(tuple(files), *map(np.concatenate, (starts, counts, numbers, offsets)))


def _joined(
    files: tuple[str, ...], start_R: Integers, length_R: Integers, file_R: Integers, offset_R: Integers
) -> _Segments:
    """Runs that follow each other both in the span and in the file become one."""
    continues_R = np.zeros(len(start_R), bool)
    continues_R[1:] = (file_R[1:] == file_R[:-1]) & (offset_R[1:] == offset_R[:-1] + length_R[:-1])
    firsts = np.flatnonzero(~continues_R)
    return _Segments(
        files=files,
        start_R=start_R[firsts],
        length_R=np.add.reduceat(length_R, firsts) if len(firsts) else length_R,
        file_R=file_R[firsts],
        offset_R=offset_R[firsts],
    )
