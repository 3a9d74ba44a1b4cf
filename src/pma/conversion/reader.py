"""A converted checkpoint is a reader around a reader: tensors under their new names, in their new order, read
from where the old ones lie. No tensor is ever held whole.
"""

# Q ranges asked for, R runs

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from pma.conversion.fitting import Conversion
from pma.conversion.template import CONFIG_FILE
from pma.conversion.views import Piece, ranges_of, stored_piece
from pma.errors import MismatchError, printable
from pma.formats import side_files
from pma.formats.contracts import CheckpointReader, ReadRequest, requests_for
from pma.formats.runs import Integers, Runs
from pma.types import Box, FileIdentity, Fragment, TensorSpec

# tensors in shorter runs are gathered in memory, from fewer and longer reads
_SHORTEST_RUN_BYTES = 2**16
# what is read at once for that
_SLAB_BYTES = 2**22
_GATHERED = "\0gathered/"  # no file can be named so


class ConvertedReader:
    """The tensors of `inner` as `conversion` makes them. Implements `CheckpointReader`.

    A tensor whose elements lie in long runs is told as those runs of the inner reader's files. Any other is
    told as one run of a file that does not exist; reads of it read what covers the range, and gather in
    memory.
    """

    def __init__(self, inner: CheckpointReader, conversion: Conversion) -> None:
        self.inner, self.conversion = inner, conversion
        self.format, self.path = inner.format, inner.path
        self.request_bytes, self.requests_in_flight = inner.request_bytes, inner.requests_in_flight
        self.ignored_files = inner.ignored_files
        self.layout_digest = _digest(inner.layout_digest, conversion)
        self._stored: dict[str, list[tuple[Fragment, Piece]]] = {}
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.conversion.tensors

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        return ()  # nothing but tensors is converted

    @property
    def is_remote(self) -> bool:
        return self.inner.is_remote

    @property
    def forget_after_reading(self) -> bool:
        return self.inner.forget_after_reading

    @forget_after_reading.setter
    def forget_after_reading(self, forget: bool) -> None:
        self.inner.forget_after_reading = forget

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        spec = self.tensors[name]
        width = spec.dtype.bits // 8
        runs = self.runs(name, 0, spec.element_count)
        columns = (runs.first_R, runs.count_R, runs.file_R, runs.offset_R)
        return tuple(
            Fragment(
                tensor=name,
                file=runs.files[file],
                offset_bytes=offset,
                length_bytes=count * width,
                flat_start=first,
            )
            for first, count, file, offset in zip(*(column.tolist() for column in columns), strict=True)
        )

    def runs(self, name: str, start: int, stop: int, box: Box | None = None) -> Runs:
        spec = self.tensors[name]
        start_Q, stop_Q, at_Q = ranges_of(spec.shape, box, start, stop)
        if self._is_gathered(name):
            return Runs(
                files=(_GATHERED + name,),
                first_R=at_Q,
                count_R=stop_Q - start_Q,
                file_R=np.zeros_like(at_Q),
                offset_R=start_Q * (spec.dtype.bits // 8),
            )
        found = [
            self._stored_runs(piece.source, source_R, source_R + count_R, at_R)
            for piece, at_R, source_R, count_R in self._moved(name, start_Q, stop_Q, at_Q)
        ]
        return _joined(found)

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        plain = [request for request in requests if not request.file.startswith(_GATHERED)]
        if plain:
            self.inner.read_many(plain)
        for request in requests:
            if request.file.startswith(_GATHERED) and len(request.into):
                self._gather(request)

    def descriptor(
        self, file: str, offset_bytes: int, length_bytes: int
    ) -> AbstractContextManager[int] | None:
        if file.startswith(_GATHERED):
            return None
        return self.inner.descriptor(file, offset_bytes, length_bytes)

    def side_files(self) -> Mapping[str, bytes]:
        """The template's, with the type in config.json that the tensors have."""
        template = self.conversion.template
        types = {spec.dtype for spec in self.tensors.values() if spec.dtype.kind == "float"}
        if len(types) != 1:
            return template.side_files
        return side_files.with_dtype(template.side_files, types.pop(), str(template.path / CONFIG_FILE))

    def identities(self) -> tuple[FileIdentity, ...]:
        return self.inner.identities()

    def close(self) -> None:
        self.inner.close()

    def check_ties(self) -> None:
        """Where a tensor is left out because the model ties it to another, their first, middle and last rows
        must be the same. Raises MismatchError.
        """
        for name, other in self.conversion.ties.items():
            spec = self.tensors[other]
            width = spec.dtype.bits // 8
            length = min(spec.shape[-1] if spec.shape else 1, spec.element_count)
            for start in (0, spec.element_count // 2, spec.element_count - length):
                stop = min(start + length, spec.element_count)
                rows = [np.empty((stop - start) * width, np.uint8) for _ in (name, other)]
                for row, one in zip(rows, (name, other), strict=True):
                    self._gather_range(self.conversion.pieces[one], width, start, stop, row)
                if not np.array_equal(rows[0], rows[1]):
                    raise MismatchError(
                        f"{printable(name)} differs from {printable(other)} in {self.path}, but "
                        f"{self.conversion.template.path / CONFIG_FILE} says the embeddings are tied"
                    )

    def _is_gathered(self, name: str) -> bool:
        width = self.tensors[name].dtype.bits // 8
        pieces = self.conversion.pieces[name]
        return any(piece.sizes and piece.run * width < _SHORTEST_RUN_BYTES for piece in pieces)

    def _moved(
        self, name: str, start_Q: Integers, stop_Q: Integers, at_Q: Integers
    ) -> Iterator[tuple[Piece, Integers, Integers, Integers]]:
        """For each piece that holds some of the ranges: (position, source index, count) of its runs."""
        if not len(start_Q):
            return
        low, high = int(start_Q.min()), int(stop_Q.max())
        for piece in self.conversion.pieces[name]:
            if piece.target_start < high and piece.target_stop > low:
                yield piece, *piece.runs(start_Q, stop_Q, at_Q)

    def _stored_runs(self, source: str, start_Q: Integers, stop_Q: Integers, at_Q: Integers) -> Runs:
        """Where ranges of a source tensor lie in files."""
        width = self.inner.tensors[source].dtype.bits // 8
        stored = self._fragments_of(source)
        files = tuple(dict.fromkeys(fragment.file for fragment, _ in stored))
        found = []
        low, high = (int(start_Q.min()), int(stop_Q.max())) if len(start_Q) else (0, 0)
        for fragment, piece in stored:
            if piece.target_start < high and piece.target_stop > low:
                at_R, inside_R, count_R = piece.runs(start_Q, stop_Q, at_Q)
                file_R = np.full(len(at_R), files.index(fragment.file))
                found.append((at_R, count_R, file_R, fragment.offset_bytes + inside_R * width))
        return _sorted(files, found)

    def _fragments_of(self, source: str) -> list[tuple[Fragment, Piece]]:
        with self._lock:
            if source not in self._stored:
                if len(self._stored) > 64:  # a block needs few tensors, and a model has many
                    self._stored.clear()
                spec = self.inner.tensors[source]
                self._stored[source] = [(f, stored_piece(spec, f)) for f in self.inner.fragments(source)]
            return self._stored[source]

    def _gather(self, request: ReadRequest) -> None:
        name = request.file.removeprefix(_GATHERED)
        width = self.tensors[name].dtype.bits // 8
        start = request.offset_bytes // width
        into = np.frombuffer(request.into, np.uint8)
        self._gather_range(self.conversion.pieces[name], width, start, start + len(into) // width, into)

    def _gather_range(
        self, pieces: Sequence[Piece], width: int, start: int, stop: int, into: NDArray[np.uint8]
    ) -> None:
        """Fill `into` with elements `start` to `stop` of a target, from slabs of sources that cover them."""
        values: NDArray[Any] = into.view(_UNITS[width])
        asked = tuple(np.array([x], np.int64) for x in (start, stop, 0))
        for piece in pieces:
            if piece.target_start >= stop or piece.target_stop <= start:
                continue
            at_R, source_R, count_R = piece.runs(*asked)
            order = np.argsort(source_R, kind="stable")
            at_R, source_R, count_R = at_R[order], source_R[order], count_R[order]
            low_S, high_S, slab_R = self._slabs(source_R, count_R, width)
            place_S = np.cumsum(high_S - low_S) - (high_S - low_S)  # slabs lie one after the other in memory
            room = _SLAB_BYTES // width
            for batch in np.split(np.arange(len(low_S)), _steps(place_S // room)):
                mine = slice(*np.searchsorted(slab_R, [batch[0], batch[-1] + 1]).tolist())
                inside_R = source_R[mine] + (place_S - low_S)[slab_R[mine]] - place_S[batch[0]]
                packed = self._read(piece.source, low_S[batch], high_S[batch], width)
                _scatter(packed, inside_R, values, at_R[mine], count_R[mine])

    def _slabs(
        self, source_R: Integers, count_R: Integers, width: int
    ) -> tuple[Integers, Integers, Integers]:
        """Slabs of the source that cover runs, which ascend in it: (start, stop) of each; each run's slab.

        A gap is read and thrown away if that costs less than another request.
        """
        gap = self.inner.request_bytes // 32 // width
        stop_R = source_R + count_R
        begins_R = np.ones(len(source_R), bool)
        begins_R[1:] = source_R[1:] - stop_R[:-1] > gap
        begins_R[_steps((source_R - source_R[0]) // (_SLAB_BYTES // width))] = True
        first_S = np.flatnonzero(begins_R)
        last_S = np.append(first_S[1:], len(source_R)) - 1
        return source_R[first_S], stop_R[last_S], np.cumsum(begins_R) - 1

    def _read(self, source: str, low_S: Integers, high_S: Integers, width: int) -> NDArray[Any]:
        """Ranges of a source tensor, one after the other."""
        length_S = high_S - low_S
        raw = np.empty(int(length_S.sum()) * width, np.uint8)
        runs = self._stored_runs(source, low_S, high_S, np.cumsum(length_S) - length_S)
        self.inner.read_many(requests_for(runs, width, memoryview(raw)))  # type: ignore[arg-type]
        return raw.view(_UNITS[width])


def _steps(ascending: Integers) -> Integers:
    """Where a value differs from the one before."""
    return np.flatnonzero(ascending[1:] != ascending[:-1]) + 1


_UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# runs of fewer elements are copied by index, longer ones one by one
_BY_INDEX = 64


def _scatter(
    slab: NDArray[Any], from_R: Integers, into: NDArray[Any], to_R: Integers, count_R: Integers
) -> None:
    if int(count_R.max()) == 1:
        into[to_R] = slab[from_R]
    elif int(count_R.sum()) < _BY_INDEX * len(count_R):
        inside = np.arange(int(count_R.sum())) - np.repeat(np.cumsum(count_R) - count_R, count_R)
        into[np.repeat(to_R, count_R) + inside] = slab[np.repeat(from_R, count_R) + inside]
    else:
        for begin, to, count in zip(from_R.tolist(), to_R.tolist(), count_R.tolist(), strict=True):
            into[to : to + count] = slab[begin : begin + count]


def _sorted(files: tuple[str, ...], found: Sequence[tuple[Integers, ...]]) -> Runs:
    none = np.empty(0, np.int64)
    first_R, count_R, file_R, offset_R = (
        np.concatenate([columns[i] for columns in found]) if found else none for i in range(4)
    )
    order = np.argsort(first_R, kind="stable")
    return Runs(
        files=files,
        first_R=first_R[order],
        count_R=count_R[order],
        file_R=file_R[order],
        offset_R=offset_R[order],
    )


def _joined(found: Sequence[Runs]) -> Runs:
    """Runs of several pieces as those of one."""
    if len(found) == 1:
        return found[0]
    numbers: dict[str, int] = {}
    columns = []
    for runs in found:
        mine = np.array([numbers.setdefault(file, len(numbers)) for file in runs.files], np.int64)
        columns.append((runs.first_R, runs.count_R, mine[runs.file_R], runs.offset_R))
    return _sorted(tuple(numbers), columns)


def _digest(layout_digest: str, conversion: Conversion) -> str:
    """Two readers of one layout lie alike after the same conversion to the same template."""
    shapes = [f"{name} {spec.shape}" for name, spec in conversion.tensors.items()]
    template = conversion.template
    parts = [layout_digest, conversion.map.digest, repr(sorted(template.facts.items())), *shapes]
    return blake3("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
