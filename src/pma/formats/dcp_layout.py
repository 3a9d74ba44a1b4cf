"""Where the chunks of an output go, and every byte around them: archives of torch.save, and `.metadata`."""

# C chunks of a tensor, D dimensions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pma.errors import UsageError, printable
from pma.formats.dcp_encoding import can_hold, encode
from pma.formats.dcp_metadata import METADATA_FILE, ByteEntry, ChunkedTensor, Metadata
from pma.formats.torch_writing import single_tensor_archive
from pma.types import DType, Fragment, OutputFile, Role, TensorSpec

# archives keep their data at multiples of 64 bytes, and beginning at such a place they do so in the file as
# well
_ALIGNMENT = 64
_FILE_BYTES = 4 * 2**30
_NOTHING = np.empty((0, 3), np.int64)
_WEIGHTS = frozenset({Role.PARAMETER, Role.BUFFER, Role.OPAQUE})


def is_training(spec: TensorSpec) -> bool:
    """Whether a tensor is only needed to resume."""
    return spec.role not in _WEIGHTS


def fresh(tensors: Mapping[str, TensorSpec]) -> Metadata:
    """Every tensor in one chunk, files filled up to a size."""
    chunked: dict[str, ChunkedTensor] = {}
    entries: dict[str, ByteEntry] = {}
    number, filled = 0, 0
    for name, spec in tensors.items():
        if filled and filled + spec.length_bytes > _FILE_BYTES:
            number, filled = number + 1, 0
        if spec.role is Role.OPAQUE:
            entries[name] = ByteEntry(file=number, offset_bytes=filled, length_bytes=spec.length_bytes)
        else:
            one = np.array([0], np.int64)
            chunked[name] = ChunkedTensor(
                dtype=spec.dtype,
                shape=spec.shape,
                starts_CD=np.zeros((1, len(spec.shape)), np.int64),
                sizes_CD=np.array(spec.shape, np.int64).reshape(1, len(spec.shape)),
                file_C=one + number,
                offset_C=one + filled,
                length_C=one,
            )
        filled += spec.length_bytes
    files = tuple(f"__0_{file}.distcp" for file in range(number + 1))
    return Metadata(files=files, tensors=chunked, entries=entries, paths={}, items=_NOTHING)


def part_layout(
    source: Metadata, prefix: str, wanted: Mapping[str, TensorSpec] | None = None
) -> tuple[list[OutputFile], dict[str, bytes]]:
    """Files and `.metadata` of one folder, chunk by chunk in the files and the order of `source`.

    `wanted`: what of it is kept, and as which type; None: all as it is.
    """
    kept = source if wanted is None else _only(source, wanted)
    for name, tensor in kept.tensors.items():
        if not can_hold(tensor.dtype):
            raise UsageError(f"{printable(name)} is {tensor.dtype.value[0]}, a type that torch does not have")
    placed = {
        name: (np.empty_like(t.offset_C), np.empty_like(t.length_C)) for name, t in kept.tensors.items()
    }
    entries = dict(kept.entries)
    files: list[OutputFile] = []
    names: list[tuple[int, str]] = []
    for number, items in enumerate(_by_file(kept)):
        if not items:
            continue
        file = _File(prefix + kept.files[number])
        for _, name, chunk in items:
            if chunk is None:
                entry = kept.entries[name]
                start = file.add_bytes(name, entry.length_bytes)
                entries[name] = replace(entry, file=len(names), offset_bytes=start)
            else:
                offset_C, length_C = placed[name]
                offset_C[chunk], length_C[chunk] = file.add_chunk(name, kept.tensors[name], chunk)
        files.append(file.finished())
        names.append((number, kept.files[number]))
    renumbered = np.full(len(kept.files), -1, np.int64)
    renumbered[[number for number, _ in names]] = np.arange(len(names))
    tensors = {
        name: replace(t, file_C=renumbered[t.file_C], offset_C=placed[name][0], length_C=placed[name][1])
        for name, t in kept.tensors.items()
    }
    done = replace(kept, files=tuple(name for _, name in names), tensors=tensors, entries=entries)
    return files, {prefix + METADATA_FILE: encode(done)}


def _only(source: Metadata, wanted: Mapping[str, TensorSpec]) -> Metadata:
    tensors = {n: replace(t, dtype=wanted[n].dtype) for n, t in source.tensors.items() if n in wanted}
    entries = {name: entry for name, entry in source.entries.items() if name in wanted}
    paths = {name: path for name, path in source.paths.items() if name in wanted}
    return replace(source, tensors=tensors, entries=entries, paths=paths, items=_NOTHING)


def _by_file(metadata: Metadata) -> list[list[tuple[int, str, int | None]]]:
    """What each file holds, in order of offset: (offset, name, number of the chunk)."""
    found: list[list[tuple[int, str, int | None]]] = [[] for _ in metadata.files]
    for name, tensor in metadata.tensors.items():
        places = zip(tensor.file_C.tolist(), tensor.offset_C.tolist(), strict=True)
        for chunk, (file, offset) in enumerate(places):
            found[file].append((offset, name, chunk))
    for name, entry in metadata.entries.items():
        found[entry.file].append((entry.offset_bytes, name, None))
    for items in found:
        items.sort(key=lambda item: item[0])
    return found


_archives: dict[tuple[DType, tuple[int, ...]], tuple[bytes, int, bytes]] = {}
_PADDING = [bytes(length) for length in range(_ALIGNMENT)]


class _File:
    """An output file in the making."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._constants: list[tuple[int, bytes]] = []
        self._fragments: list[Fragment] = []
        self._end = 0

    def add_bytes(self, name: str, length_bytes: int) -> int:
        """Bytes as they are; returns where they begin."""
        start = self._aligned()
        self._fragment(name, length_bytes, None)
        return start

    def add_chunk(self, name: str, tensor: ChunkedTensor, chunk: int) -> tuple[int, int]:
        """A chunk in an archive of its own; returns where that begins, and its length."""
        starts, sizes = tuple(tensor.starts_CD[chunk].tolist()), tuple(tensor.sizes_CD[chunk].tolist())
        key = (tensor.dtype, sizes)
        if key not in _archives:
            if len(_archives) > 10_000:
                _archives.clear()
            _archives[key] = single_tensor_archive(tensor.dtype, sizes)
        begin, length_bytes, end = _archives[key]
        start = self._aligned()
        self._constant(begin)
        self._fragment(name, length_bytes, (starts, sizes))
        self._constant(end)
        return start, self._end - start

    def finished(self) -> OutputFile:
        """The file, complete."""
        return OutputFile(
            name=self._name,
            size_bytes=self._end,
            constants=tuple(self._constants),
            fragments=tuple(self._fragments),
        )

    def _aligned(self) -> int:
        gap = -self._end % _ALIGNMENT
        if gap:
            self._constant(_PADDING[gap])
        return self._end

    def _constant(self, data: bytes) -> None:
        self._constants.append((self._end, data))
        self._end += len(data)

    def _fragment(
        self, name: str, length_bytes: int, box: tuple[tuple[int, ...], tuple[int, ...]] | None
    ) -> None:
        fragment = Fragment(
            tensor=name,
            file=self._name,
            offset_bytes=self._end,
            length_bytes=length_bytes,
            flat_start=0 if box is None else None,
            box=box,
        )
        self._fragments.append(fragment)
        self._end += length_bytes
