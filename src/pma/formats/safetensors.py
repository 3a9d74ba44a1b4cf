"""Hugging Face safetensors checkpoints, single or sharded, alone or in a Trainer's `checkpoint-N`: reader
and writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pma.errors import FormatError, IncompleteError, printable
from pma.formats import hf_trainer, interval_mean, strict_json
from pma.formats.contracts import CheckpointReader
from pma.formats.folder import open_folder
from pma.formats.reader import FileReader
from pma.formats.safetensors_header import encode_header, read_header
from pma.formats.state_beside import with_trainer_state
from pma.types import CheckpointMeta, Fragment, Layout, OutputFile, TensorSpec

FORMAT = "safetensors"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LARGEST_INDEX_BYTES = 32 * 2**20
# as large as transformers makes them
_SHARD_BYTES = 5 * 10**9
CHECKPOINT_NAME = hf_trainer.TRAINER_FOLDER


def detect(path: Path) -> bool:
    """Whether `path` is a safetensors checkpoint: such a file, or a folder that holds one."""
    if path.is_dir():
        return (path / INDEX_FILE).is_file() or bool(_files(path))
    return path.is_file() and path.suffix == ".safetensors"


def open_reader(path: Path) -> SafetensorsReader:
    """Open a checkpoint: parses every header, reads no tensor."""
    return SafetensorsReader(path)


def open_resumable(path: Path) -> FileReader:
    """Open one with what the Trainer keeps in files beside it."""
    return with_trainer_state(SafetensorsReader(path))


class SafetensorsReader(FileReader):
    """Reads one safetensors checkpoint by position. Implements `CheckpointReader`."""

    format = FORMAT

    def __init__(self, path: Path) -> None:
        folder = open_folder(path if path.is_dir() else path.parent)
        names, weight_map = _shard_names(path)
        headers = folder.each(lambda name: read_header(folder, name), names)
        self._headers = dict(zip(names, headers, strict=True))
        super().__init__(path, folder, {name: header.digest for name, header in self._headers.items()})
        beside = _files(path) if path.is_dir() else []
        others = tuple(name for name in beside if name not in self._headers)
        training = hf_trainer.training_files(folder.names()) if path.is_dir() else ()
        self.ignored_files = others + training
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

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: spec for header in self._headers.values() for name, spec in header.tensors.items()}

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        file = self._file_of[name]
        header = self._headers[file]
        return (Fragment.whole(header.tensors[name], file, header.offsets_bytes[name]),)


def read_meta(path: Path) -> CheckpointMeta:
    """What the Trainer recorded beside the weights; all unknown for a lone file."""
    return hf_trainer.read_meta(path) if path.is_dir() else CheckpointMeta()


def _files(folder: Path) -> list[str]:
    """Names of a folder's safetensors files, without means that are stored beside a checkpoint."""
    names = sorted(found.name for found in folder.glob("*.safetensors"))
    return [name for name in names if not interval_mean.is_mean(name)]


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
    names = _files(path)
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


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where each tensor of an output goes: into a file of the same name as in `like`, else into files filled
    up to a size. A lone file is named as transformers expects.
    """
    shards = _shards(tensors) if like is None else {name: like.fragments(name)[0].file for name in tensors}
    alone = len(set(shards.values())) == 1
    return layout_of(tensors, dict.fromkeys(shards, SINGLE_FILE) if alone else shards)


def in_files(layout: Layout, count: int) -> Layout:
    """The same tensors in `count` files of like size, as far as tensors allow; itself where it has as many,
    or is not of this format. Files and records beside the weights stay.
    """
    index = layout.records.get(INDEX_FILE)
    ours = {SINGLE_FILE} if index is None else set(json.loads(index)["weight_map"].values())
    beside = [file for file in layout.files if file.name not in ours]
    count -= len(beside)
    if len(beside) == len(layout.files):
        return layout
    others = {fragment.tensor for file in beside for fragment in file.fragments}
    tensors = {name: spec for name, spec in layout.tensors.items() if name not in others}
    count = min(count, len(tensors))
    if len(layout.files) - len(beside) >= count:
        return layout
    planned = layout_of(tensors, _named(_spread(tensors, count)))
    records = {name: data for name, data in layout.records.items() if name != INDEX_FILE}
    return replace(layout, files=(*planned.files, *beside), records={**planned.records, **records})


def _spread(tensors: Mapping[str, TensorSpec], count: int) -> dict[str, int]:
    """Number of the file by tensor, in the order given: where its middle lies among all bytes, but so that
    each of `count` files has at least one.
    """
    total = max(1, sum(spec.length_bytes for spec in tensors.values()))
    numbers, number, before = dict[str, int](), 0, 0
    for position, (name, spec) in enumerate(tensors.items()):
        wanted = int((before + spec.length_bytes / 2) * count / total)
        least = max(number, count - (len(tensors) - position))  # or too few would be left for the rest
        number = max(least, min(wanted, number + 1, position, count - 1))
        numbers[name] = number
        before += spec.length_bytes
    return numbers


def layout_of(tensors: Mapping[str, TensorSpec], shards: Mapping[str, str]) -> Layout:
    """Each tensor in the file that `shards` names, wide elements first.

    Descending element size keeps every element aligned to its size, so that blocks cut at multiples of 8
    bytes never split one; the order is otherwise the one given.
    """
    specs_by_file: dict[str, list[TensorSpec]] = {}
    for name, spec in tensors.items():
        specs_by_file.setdefault(shards[name], []).append(spec)
    files = tuple(_output_file(file, inside) for file, inside in specs_by_file.items())
    alone = list(specs_by_file) == [SINGLE_FILE]
    records = {} if alone else {INDEX_FILE: _index(tensors, shards)}
    return Layout(tensors=dict(tensors), files=files, records=records)


def _shards(tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """File by tensor, in the order given, each file as large as fits below a limit."""
    numbers, number, filled = {}, 0, 0
    for name, spec in tensors.items():
        if filled and filled + spec.length_bytes > _SHARD_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += spec.length_bytes
    return _named(numbers)


def _named(numbers: Mapping[str, int]) -> dict[str, str]:
    count = max(numbers.values(), default=0) + 1
    return {name: f"model-{number + 1:05}-of-{count:05}.safetensors" for name, number in numbers.items()}


def _output_file(file: str, inside: list[TensorSpec]) -> OutputFile:
    inside = sorted(inside, key=lambda spec: -min(spec.dtype.bits, 64))
    header = encode_header(inside, {"format": "pt"})
    fragments, offset = [], len(header)
    for spec in inside:
        fragments.append(Fragment.whole(spec, file, offset))
        offset += spec.length_bytes
    return OutputFile(name=file, size_bytes=offset, constants=((0, header),), fragments=tuple(fragments))


def _index(tensors: Mapping[str, TensorSpec], shards: Mapping[str, str]) -> bytes:
    index = {
        "metadata": {"total_size": sum(spec.length_bytes for spec in tensors.values())},
        "weight_map": dict(sorted(shards.items())),
    }
    return json.dumps(index, indent=2).encode("utf-8") + b"\n"
