"""Bytes of a span from one source: what was read ahead, else read now, in as few calls as its pieces
allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.averaging.kernels import DONE, read_runs
from pma.engine.blocks import Block
from pma.engine.read_ahead import ReadAhead
from pma.engine.segments import Segments
from pma.formats.contracts import CheckpointReader

Buffer = NDArray[Any]

#: pieces of a block that are worth a call of the compiled loop each
MOST_CUTS = 64


class SpanReader:
    """Reads for one thread, and counts what it read."""

    def __init__(self, readers: Sequence[CheckpointReader], ahead: ReadAhead | None = None) -> None:
        self._readers, self._ahead = readers, ahead
        self.bytes_read = 0

    def read(
        self, block: Block, index: int, segments: Segments, number: int, start: int, into: Buffer
    ) -> None:
        """Fill `into` with source `number`'s bytes of span `index` of a block, from byte `start` on."""
        if self._ahead is None or not self._ahead.take(block, index, number, start, into):
            reader = self._readers[number]
            if segments.count(reader) < MOST_CUTS or not _gathered(segments, reader, start, into):
                reader.read_many(segments.requests(reader, start, start + len(into), view(into)))
        self.bytes_read += len(into)


def _gathered(segments: Segments, reader: CheckpointReader, start: int, into: Buffer) -> bool:
    """Fill `into` from many small pieces of local files, without the interpreter between them: a shard in
    columns has one for each row. False where that cannot be done.
    """
    for file, place_R, length_R, offset_R in segments.runs(reader, start, start + len(into)):
        first = int(offset_R.min())
        descriptor = reader.descriptor(file, first, int((offset_R + length_R).max()) - first)
        if descriptor is None:
            return False
        with descriptor as number:
            if read_runs(np.int32(number), offset_R, place_R, length_R, into) != DONE:
                return False  # reading again by requests finds out why
    return True


def view(raw: Buffer) -> memoryview:
    """A buffer as requests want it."""
    return memoryview(raw)  # type: ignore[arg-type]  # numpy's stubs for 3.11 do not say it is a buffer
