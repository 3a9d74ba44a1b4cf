"""Hugging Face safetensors checkpoints, single or sharded, alone or in a Trainer's `checkpoint-N`: reader
and writer.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.errors import FormatError, IncompleteError, InputError, SpaceError, StorageError, printable
from pma.formats import hf_trainer, strict_json
from pma.formats.contracts import UNFINISHED_SUFFIX, ReadRequest
from pma.formats.files import NO_ROOM, OpenFiles, coalesced, read_exactly
from pma.formats.safetensors_header import encode_header, read_header
from pma.quantities import bytes_text
from pma.types import CheckpointMeta, FileIdentity, Fragment, Layout, OutputFile, TensorSpec

FORMAT = "safetensors"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LARGEST_INDEX_BYTES = 64 * 2**20
# one call for 4 MiB takes up to three times as long as eight: the system looks for memory in larger pieces
_WRITE_BYTES = 2**19


def detect(path: Path) -> bool:
    """Whether `path` is a safetensors checkpoint: such a file, or a folder that holds one."""
    if path.is_dir():
        return (path / INDEX_FILE).is_file() or any(path.glob("*.safetensors"))
    return path.is_file() and path.suffix == ".safetensors"


def open_reader(path: Path) -> SafetensorsReader:
    """Open a checkpoint: parses every header, reads no tensor."""
    return SafetensorsReader(path)


class SafetensorsReader:
    """Reads one safetensors checkpoint by position. Implements `CheckpointReader`."""

    format = FORMAT
    request_bytes = 2**19
    forget_after_reading = False
    requests_in_flight = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path if path.is_dir() else path.parent
        names, weight_map = _shard_names(path)
        self._headers = {name: read_header(self._folder / name) for name in names}
        beside = sorted(found.name for found in path.glob("*.safetensors")) if path.is_dir() else []
        self.ignored_files = tuple(name for name in beside if name not in self._headers)
        self._file_of: dict[str, str] = {}
        for file, header in self._headers.items():
            for name in header.tensors:
                if name in self._file_of:
                    raise FormatError(
                        f"{path}: {printable(name)} is in both {self._file_of[name]} and {file}"
                    )
                self._file_of[name] = file
        if weight_map is not None:
            _check_index(path, weight_map, self._file_of)
        self._files = OpenFiles(self._folder)
        digests = [f"{name} {header.digest} {header.file_bytes}" for name, header in self._headers.items()]
        self.layout_digest = blake3("\n".join(digests).encode("utf-8", "surrogateescape")).hexdigest()

    @cached_property
    def meta(self) -> CheckpointMeta:
        if self._folder.name.endswith(UNFINISHED_SUFFIX):
            return CheckpointMeta(incomplete="it is an output of pma that is not finished")
        return hf_trainer.read_meta(self.path) if self.path.is_dir() else CheckpointMeta()

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: spec for header in self._headers.values() for name, spec in header.tensors.items()}

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        file = self._file_of[name]
        header = self._headers[file]
        fragment = Fragment(
            tensor=name,
            file=file,
            offset_bytes=header.offsets_bytes[name],
            length_bytes=header.tensors[name].length_bytes,
            flat_start=0,
        )
        return (fragment,)

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        for file, offset_bytes, buffers in coalesced(requests):
            with self._files.use(file) as descriptor:
                read_exactly(descriptor, offset_bytes, buffers, self._folder / file)
                if self.forget_after_reading:
                    length = sum(len(buffer) for buffer in buffers)
                    os.posix_fadvise(descriptor, offset_bytes, length, os.POSIX_FADV_DONTNEED)

    def descriptor(self, file: str) -> AbstractContextManager[int] | None:
        # what is to be forgotten after reading goes through `read_many`, which does that
        return None if self.forget_after_reading else self._files.use(file)

    def identities(self) -> tuple[FileIdentity, ...]:
        found = []
        for name, header in self._headers.items():
            status = os.stat(self._folder / name)
            found.append(
                FileIdentity(
                    name=name,
                    size_bytes=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                    header_digest=header.digest,
                )
            )
        return tuple(found)

    def close(self) -> None:
        self._files.close()


def _shard_names(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint, in order of name, and the index's file of each tensor, where there is an
    index.

    Raises FormatError where it is not clear which files they are.
    """
    if not path.is_dir():
        return [path.name], None
    single, index = (path / SINGLE_FILE).is_file(), (path / INDEX_FILE).is_file()
    if single and index:
        raise FormatError(
            f"{path} holds both {SINGLE_FILE} and {INDEX_FILE}; which is the model? Remove the stale one"
        )
    if index:
        weight_map = _weight_map(path)
        indexed = set(weight_map.values())
        for found in sorted(path.glob("*-of-*.safetensors")):
            if found.name not in indexed:
                raise FormatError(
                    f"{path}: {printable(found.name)} looks like a shard, but {INDEX_FILE} does not name it; "
                    "remove it, or repair the index"
                )
        return sorted(indexed), weight_map
    if single:
        return [SINGLE_FILE], None
    names = sorted(found.name for found in path.glob("*.safetensors"))
    if len(names) == 1:
        return names, None
    if not names:
        raise FormatError(f"{path} holds no safetensors file")
    raise IncompleteError(
        f"{path} holds {len(names)} safetensors files but no {INDEX_FILE}, which is written last"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    weight_map = strict_json.load_object(path, _LARGEST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is missing or empty")
    for shard in set(map(str, weight_map.values())):
        # a name such as ../../etc/passwd or one with a separator must not lead out of the folder
        plain = Path(shard).name == shard and "\\" not in shard and shard.isprintable()
        if not shard.endswith(".safetensors") or not plain:
            raise FormatError(f"{path}: {printable(shard)!r} is not a plain name of a safetensors file")
    return {name: str(shard) for name, shard in weight_map.items()}


def _check_index(folder: Path, indexed: Mapping[str, str], file_of: Mapping[str, str]) -> None:
    if indexed == file_of:
        return
    for name in indexed.keys() | file_of.keys():
        if indexed.get(name) != file_of.get(name):
            raise FormatError(
                f"{folder}: {printable(name)} is in {file_of.get(name, 'no shard')}, "
                f"but {INDEX_FILE} says {indexed.get(name, 'nothing of it')}"
            )


def plan_layout(tensors: Mapping[str, TensorSpec], shards: Mapping[str, str]) -> Layout:
    """Where each tensor of an output goes: into the file that `shards` names, wide elements first.

    Descending element size keeps every element aligned to its size, so that blocks cut at multiples of 8
    bytes never split one; the order is otherwise the one given.
    """
    specs_by_file: dict[str, list[TensorSpec]] = {}
    for name, spec in tensors.items():
        specs_by_file.setdefault(shards[name], []).append(spec)
    files = []
    for file, inside in specs_by_file.items():
        inside.sort(key=lambda spec: -min(spec.dtype.bits, 64))
        header = encode_header(inside, {"format": "pt"})
        fragments, offset = [], len(header)
        for spec in inside:
            fragments.append(
                Fragment(
                    tensor=spec.name,
                    file=file,
                    offset_bytes=offset,
                    length_bytes=spec.length_bytes,
                    flat_start=0,
                )
            )
            offset += spec.length_bytes
        files.append(
            OutputFile(name=file, size_bytes=offset, constants=((0, header),), fragments=tuple(fragments))
        )
    return Layout(tensors=dict(tensors), files=tuple(files))


def shards_like(reader: SafetensorsReader, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Which output file each tensor goes to: the one it has in `reader`; a lone file is named as
    transformers expects.
    """
    files = {name: reader.fragments(name)[0].file for name in tensors}
    alone = len(set(files.values())) == 1
    return dict.fromkeys(files, SINGLE_FILE) if alone else files


def _no_room(folder: Path, layout: Layout, error: OSError) -> SpaceError:
    needed = bytes_text(sum(file.size_bytes for file in layout.files))
    return SpaceError(
        f"{folder.parent} has no room for the output's {needed} ({error.strerror}); "
        "free some space or choose another place"
    )


class SafetensorsWriter:
    """Writes one safetensors checkpoint into `folder`. Implements `CheckpointWriter`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layout: Layout | None = None

    def create(self, layout: Layout) -> None:
        self._layout = layout
        for file in layout.files:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._folder / file.name, flags, 0o644)
            try:
                if os.fstat(descriptor).st_size != file.size_bytes:
                    os.ftruncate(descriptor, file.size_bytes)
                # reserve the room now: a full disk must be found before hours of reading
                os.posix_fallocate(descriptor, 0, max(file.size_bytes, 1))
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise _no_room(self._folder, layout, error) from error
                if error.errno == errno.EIO:
                    raise _write_error(self._folder / file.name, error) from error
                # else the file system cannot reserve
            finally:
                os.close(descriptor)

    def open_part(self) -> SafetensorsPart:
        return SafetensorsPart(self._folder)

    def write_bytes(self, name: str, data: bytes) -> None:
        path = self._folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o644)
        try:
            _write_exactly(descriptor, 0, memoryview(data), path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        assert self._layout is not None
        files = self._layout.files
        if [file.name for file in files] == [SINGLE_FILE]:
            return
        weight_map = {fragment.tensor: file.name for file in files for fragment in file.fragments}
        total = sum(spec.length_bytes for spec in self._layout.tensors.values())
        index: dict[str, Any] = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self.write_bytes(INDEX_FILE, json.dumps(index, indent=2).encode("utf-8") + b"\n")


class SafetensorsPart:
    """One process's open output files. Implements `PartWriter`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        _write_exactly(self._descriptor(file), offset_bytes, values, self._folder / file)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            descriptor = os.open(self._folder / file, os.O_WRONLY | os.O_CLOEXEC)
            if self._descriptors.setdefault(file, descriptor) != descriptor:
                os.close(descriptor)  # another thread was first
        return self._descriptors[file]

    def sync(self) -> None:
        for file, descriptor in list(self._descriptors.items()):
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                raise _write_error(self._folder / file, error) from error

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def _write_exactly(descriptor: int, offset_bytes: int, values: memoryview, path: Path) -> None:
    while len(values):
        try:
            count = os.pwrite(descriptor, values[:_WRITE_BYTES], offset_bytes)
        except OSError as error:
            raise _write_error(path, error) from error
        offset_bytes += count
        values = values[count:]


def _write_error(path: Path, error: OSError) -> InputError:
    kind = SpaceError if error.errno in NO_ROOM else StorageError
    return kind(f"{path}: writing failed: {error.strerror}")
