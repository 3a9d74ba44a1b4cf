"""Where a span's bytes lie in a source: found once for sources that are laid out alike, then cut for each
tile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pma.engine.blocks import Span
from pma.formats.contracts import CheckpointReader, ReadRequest, stored_runs


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Contiguous bytes of a source: where in the span they go, and where they lie."""

    span_start: int
    length_bytes: int
    file: str
    offset_bytes: int

    def continued_by(self, other: _Segment) -> bool:
        """Whether `other` follows at once, both in the file and in the span."""
        ends = self.file, self.offset_bytes + self.length_bytes, self.span_start + self.length_bytes
        return ends == (other.file, other.offset_bytes, other.span_start)


class Segments:
    """A span's place in every source that is asked for."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._known: dict[str, tuple[list[int], list[_Segment]]] = {}

    def whole(self, reader: CheckpointReader) -> tuple[str, int] | None:
        """File and byte offset of the span in a source, if it lies there in one piece."""
        _, segments = self._of(reader)
        return (segments[0].file, segments[0].offset_bytes) if len(segments) == 1 else None

    def requests(
        self, reader: CheckpointReader, start: int, stop: int, into: memoryview
    ) -> list[ReadRequest]:
        """Requests that fill `into` with bytes `start` to `stop` of the span."""
        starts, segments = self._of(reader)
        requests = []
        for segment in segments[bisect_right(starts, start) - 1 :]:
            if segment.span_start >= stop:
                break
            low = max(start, segment.span_start)
            high = min(stop, segment.span_start + segment.length_bytes)
            offset = segment.offset_bytes + low - segment.span_start
            part = into[low - start : high - start]
            requests.append(ReadRequest(file=segment.file, offset_bytes=offset, into=part))
        return requests

    def _of(self, reader: CheckpointReader) -> tuple[list[int], list[_Segment]]:
        if reader.layout_digest not in self._known:
            found = _joined(sorted(self._runs(reader), key=lambda segment: segment.span_start))
            self._known[reader.layout_digest] = [segment.span_start for segment in found], found
        return self._known[reader.layout_digest]

    def _runs(self, reader: CheckpointReader) -> Iterator[_Segment]:
        width = self._span.dtype_in.bits // 8
        position = 0  # of the piece in the span, in elements
        for piece in self._span.pieces:
            spec, fragments = reader.tensors[piece.tensor], reader.fragments(piece.tensor)
            for first, count, file, offset_bytes in stored_runs(spec, fragments, piece.start, piece.stop):
                yield _Segment(
                    span_start=(position + first - piece.start) * width,
                    length_bytes=count * width,
                    file=file,
                    offset_bytes=offset_bytes,
                )
            position += piece.stop - piece.start


def _joined(segments: list[_Segment]) -> list[_Segment]:
    joined: list[_Segment] = []
    for segment in segments:
        if joined and joined[-1].continued_by(segment):
            joined[-1] = replace(joined[-1], length_bytes=joined[-1].length_bytes + segment.length_bytes)
        else:
            joined.append(segment)
    return joined
