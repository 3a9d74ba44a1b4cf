"""A distributed checkpoint: one folder of `.metadata` and `.distcp` files, or several in one checkpoint,
read as named tensors.
"""

# C chunks of a tensor, D dimensions

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from pma.errors import FormatError, IncompleteError, printable
from pma.formats import dcp_metadata
from pma.formats.dcp_items import Items
from pma.formats.dcp_metadata import LARGEST_METADATA_BYTES, METADATA_FILE, Metadata
from pma.formats.dcp_profiles import Profile
from pma.formats.folder import Folder, open_folder
from pma.formats.reader import FileReader
from pma.formats.runs import Runs, runs_of, whole_box
from pma.formats.torch_archive import read_archive
from pma.types import Box, Fragment, TensorSpec

#: values of training state that are read are a few numbers
_LARGEST_VALUE_BYTES = 16 * 2**20


# a run is listed before its checkpoints are opened; large ones are read again rather than held
_recent: OrderedDict[tuple[str, int], Metadata] = OrderedDict()
_MOST_RECENT = 64
_LARGEST_KEPT_BYTES = 2 * 2**20


def _parsed(data: bytes, digest: str, where: str, stored_bytes: int) -> Metadata:
    key = (digest, stored_bytes)
    metadata = _recent.pop(key, None) or dcp_metadata.parse(data, where, stored_bytes)
    if len(data) <= _LARGEST_KEPT_BYTES:
        _recent[key] = metadata
        while len(_recent) > _MOST_RECENT:
            _recent.popitem(last=False)
    return metadata


class Part:
    """One folder with a `.metadata`, `prefix` below the checkpoint ("" or "name/")."""

    def __init__(self, folder: Folder, prefix: str) -> None:
        self.prefix = prefix
        name = prefix + METADATA_FILE
        if not (folder.path / name).is_file():
            raise IncompleteError(
                f"{folder.path / name} is missing; it is written last, so the save did not finish"
            )
        inside = [found for found in (folder.path / prefix).iterdir() if found.suffix == ".distcp"]
        stored_bytes = sum(found.stat().st_size for found in inside)
        # each name has an item of a kilobyte or more in the files
        data = folder.read_whole(name, min(LARGEST_METADATA_BYTES, stored_bytes + 2**20))
        self.digest = blake3(data).hexdigest()
        where = str(folder.path / name)
        self.metadata = _parsed(data, self.digest, where, stored_bytes)
        self.files = tuple(prefix + file for file in self.metadata.files)
        _check_places(self.metadata, [folder.size_bytes(file) for file in self.files], folder.path / prefix)


class DcpReader(FileReader):
    """Reads one distributed checkpoint by position. Implements `CheckpointReader`.

    A tensor's fragments are its chunks; entries that are no tensors are rows of bytes.
    """

    def __init__(self, path: Path, prefixes: tuple[str, ...], profile: Profile | None) -> None:
        folder = open_folder(path)
        self.parts = [Part(folder, prefix) for prefix in prefixes]
        digests: dict[str, str] = {}
        for part in self.parts:
            digests |= dict.fromkeys((part.prefix + METADATA_FILE, *part.files), part.digest)
        super().__init__(path, folder, digests)
        self._home: dict[str, Part] = {}
        for part in self.parts:
            for name in (*part.metadata.tensors, *part.metadata.entries):
                if name in self._home:
                    raise FormatError(f"{path}: {printable(name)} is stored twice")
                self._home[name] = part
        self.profile = profile or self.recognise(self._home)
        self._items = {part.prefix: Items(folder, part.files) for part in self.parts}
        self._offsets: dict[str, NDArray[np.int64]] = {}

    def recognise(self, names: Mapping[str, object]) -> Profile:
        """The profile that the names tell."""
        raise NotImplementedError("a subclass knows how")

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.stored()

    def stored(self) -> dict[str, TensorSpec]:
        """Everything that is stored, with its role."""
        shapes = {name: t.shape for part in self.parts for name, t in part.metadata.tensors.items()}
        found = {}
        for part in self.parts:
            for name, tensor in part.metadata.tensors.items():
                found[name] = self.profile.spec(name, tensor.dtype, tensor.shape, shapes)
            for name, entry in part.metadata.entries.items():
                found[name] = self.profile.entry(name, entry.length_bytes)
        return found

    def home(self, name: str) -> Part:
        """The folder that a name is stored in."""
        return self._home[name]

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        part = self._home[name]
        entry = part.metadata.entries.get(name)
        if entry is None:
            return self._chunks(part, name, np.arange(len(part.metadata.tensors[name].file_C)))
        file, start, length = part.files[entry.file], entry.offset_bytes, entry.length_bytes
        return (Fragment(tensor=name, file=file, offset_bytes=start, length_bytes=length, flat_start=0),)

    def runs(self, name: str, start: int, stop: int, box: Box | None = None) -> Runs:
        # of a thousand chunks a block of another checkpoint needs two or three
        part, spec = self._home[name], self.tensors[name]
        tensor = part.metadata.tensors.get(name)
        if tensor is None:
            return super().runs(name, start, stop, box)
        low_D, high_D = (
            np.array(edge, np.int64) for edge in _asked(box or whole_box(spec.shape), start, stop)
        )
        ends_CD = tensor.starts_CD + tensor.sizes_CD
        wanted = np.flatnonzero(((tensor.starts_CD < high_D) & (ends_CD > low_D)).all(axis=1))
        return runs_of(spec, self._chunks(part, name, wanted), start, stop, box)

    @cached_property
    def layout_digest(self) -> str:
        digest = blake3()
        for name, spec in self.tensors.items():
            entry = self._home[name].metadata.entries.get(name)
            digest.update(
                f"{name}\0{entry}\0{spec.dtype.value[0]}{spec.shape}\0".encode("utf-8", "surrogatepass")
            )
            tensor = self._home[name].metadata.tensors.get(name)
            if tensor is not None:
                for column in (tensor.starts_CD, tensor.sizes_CD, tensor.file_C, self._data_offsets(name)):
                    digest.update(np.ascontiguousarray(column).tobytes())
        for part in self.parts:
            digest.update("\0".join(("", *part.files)).encode())
        return digest.hexdigest()

    def value(self, name: str, records: Container[str] = ()) -> Any:
        """A small value of the training state; None where there is none. `records`: see `unpickle`."""
        part = self._home.get(name)
        if part is None:
            return None
        spec = self.tensors[name]
        entry = part.metadata.entries.get(name)
        if entry is None:
            if spec.element_count != 1 or spec.dtype.kind != "integer":
                return None
            into = bytearray(spec.length_bytes)
            fragment = self.fragments(name)[0]
            self.folder.read(fragment.file, fragment.offset_bytes, [memoryview(into)])
            return int.from_bytes(into, "little", signed=True)
        if entry.length_bytes > _LARGEST_VALUE_BYTES:
            return None
        file = part.files[entry.file]
        return read_archive(self.folder, file, entry.offset_bytes, entry.length_bytes, records=records).value

    def _chunks(self, part: Part, name: str, numbers: NDArray[np.int64]) -> tuple[Fragment, ...]:
        tensor, offsets_C = part.metadata.tensors[name], self._data_offsets(name)
        width = tensor.dtype.bits // 8
        columns = (tensor.starts_CD, tensor.sizes_CD, tensor.file_C, offsets_C)
        return tuple(
            Fragment(
                tensor=name,
                file=part.files[file],
                offset_bytes=offset,
                length_bytes=int(np.prod(sizes, dtype=np.int64)) * width,
                box=(tuple(starts), tuple(sizes)),
            )
            for starts, sizes, file, offset in zip(*(c[numbers].tolist() for c in columns), strict=True)
        )

    def _data_offsets(self, name: str) -> NDArray[np.int64]:
        if name not in self._offsets:
            part = self._home[name]
            self._offsets[name] = self._items[part.prefix].data_offsets(name, part.metadata.tensors[name])
        return self._offsets[name]


def _asked(box: Box, start: int, stop: int) -> tuple[list[int], list[int]]:
    """Edges of the rows of `box` that hold its elements `start` to `stop`."""
    starts, sizes = box
    low, high = list(starts), [a + n for a, n in zip(starts, sizes, strict=True)]
    row = int(np.prod(sizes[1:], dtype=np.int64)) if sizes else 0
    if row:
        low[0], high[0] = starts[0] + start // row, min(high[0], starts[0] - (-stop // row))
    return low, high


def _check_places(metadata: Metadata, file_bytes: list[int], folder: Path) -> None:
    """Every stored item lies in its file, and none over another."""
    numbers, starts, lengths = metadata.items.T
    order = np.lexsort((starts, numbers))
    numbers, starts, ends = numbers[order], starts[order], (starts + lengths)[order]
    beyond = np.flatnonzero(ends > np.array(file_bytes, np.int64)[numbers])
    if len(beyond):
        file = int(numbers[beyond[0]])
        raise IncompleteError(
            f"{folder / metadata.files[file]} has {file_bytes[file]} bytes, but {METADATA_FILE} has an item "
            f"up to byte {ends[beyond[0]]}. It was cut short, or belongs to another save"
        )
    over = np.flatnonzero((numbers[1:] == numbers[:-1]) & (starts[1:] < ends[:-1]))
    if len(over):
        file, start = int(numbers[over[0] + 1]), int(starts[over[0] + 1])
        raise FormatError(f"{folder / metadata.files[file]}: items overlap at byte {start}")
