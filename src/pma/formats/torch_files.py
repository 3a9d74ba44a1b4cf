"""Plain files of `torch.save`: nanochat, litgpt, Lightning, a bare state dict, `pytorch_model.bin` and its
shards.

A checkpoint is one file, or a folder that holds one such file or one index. A merge has the structure of its
newest source, in files of the same names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import cast

from blake3 import blake3

from pma.errors import FormatError, InputError, printable
from pma.formats import hf_trainer, nanochat, side_files
from pma.formats.contracts import CheckpointReader
from pma.formats.folder import Folder, open_folder
from pma.formats.reader import FileReader
from pma.formats.state_beside import WithState, with_trainer_state
from pma.formats.strict_json import parse_object
from pma.formats.torch_archive import StoredTensor, read_archive
from pma.formats.torch_contents import (
    RECORDS,
    Contents,
    contents,
    meta_of,
    others_in,
    rebuilt,
    spec_of,
    weights_in,
)
from pma.formats.torch_pickle import CannotEncode
from pma.formats.torch_writing import archive_layout
from pma.formats.unpickling import OrderedMapping
from pma.types import CheckpointMeta, Fragment, Layout, OutputFile, TensorSpec

FORMAT = "torch"
#: nanochat's files, litgpt's folders, Lightning's files
CHECKPOINT_NAME = re.compile(
    r"(?:model_(?=\d+\.pt\Z)|step-(?=\d+\Z)|(?:.*[^A-Za-z])?step=(?=\d+(?:-v\d+)?\.ckpt\Z))"
    r"(?P<step>\d{1,18})(?:\.pt|(?:-v\d+)?\.ckpt)?",
    re.ASCII,
)
_LITGPT_FILE, _BIN_FILE, _INDEX_FILE = "lit_model.pth", "pytorch_model.bin", "pytorch_model.bin.index.json"
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# files of other formats, and of what goes with a checkpoint but holds no weights
_OTHERS = re.compile(
    r"optim(izer)?[_.].*|.*optim_states\.pt|.*model_states\.pt|common\.pt|scheduler\.pt|scaler\.pt|rng_state.*|"
    r"random_states.*|training_args\.bin|rank\d+\.pt|\..*",
    re.ASCII,
)
_LITGPT_SIDE_FILES = ("model_config.yaml", "hyperparameters.yaml")
_LARGEST_SIDE_BYTES = 2**20
_LARGEST_INDEX_BYTES = 64 * 2**20


def detect(path: Path) -> bool:
    """Whether `path` is such a file, or a folder with exactly one, judged by names."""
    return _main_file(path) is not None


def open_reader(path: Path) -> TorchReader:
    """Open a checkpoint: reads directories and pickles, no tensor."""
    return TorchReader(path)


def open_resumable(path: Path) -> FileReader:
    """Open one with what a trainer keeps in files beside it: the Trainer's, or nanochat's."""
    reader = TorchReader(path)
    if nanochat.is_model(reader.main):
        archives = nanochat.optimizer_files(reader.folder, reader.main)
        return WithState(reader, archives) if archives else reader
    return with_trainer_state(reader)


def read_meta(path: Path) -> CheckpointMeta:
    """What the file itself, or the record beside it, says. What cannot be read is incomplete, with the
    reason.
    """
    file = _main_file(path)
    folder = path if path.is_dir() else path.parent
    if file is None:
        return CheckpointMeta(incomplete="no weights are there yet")
    if nanochat.is_model(file):
        return nanochat.read_meta(folder, file)
    if file in (_BIN_FILE, _INDEX_FILE):
        return hf_trainer.read_meta(folder) if path.is_dir() else CheckpointMeta()
    try:
        with closing(open_folder(folder)) as opened:
            return meta_of(_open(opened, file)[0])
    except InputError as error:
        return CheckpointMeta(incomplete=str(error))


class TorchReader(FileReader):
    """Reads the tensors of files of `torch.save` by position. Implements `CheckpointReader`."""

    format = FORMAT

    def __init__(self, path: Path) -> None:
        folder = open_folder(path if path.is_dir() else path.parent)
        main = _main_file(path)
        if main is None:
            raise FormatError(f"{path} holds no file of torch.save, or several that could be meant; name one")
        self.main = main
        self.contents: dict[str, Contents] = {}
        digests: dict[str, str] = {}
        with closing(folder):
            for file in _shard_names(folder) if main == _INDEX_FILE else [main]:
                self.contents[file], digests[file] = _open(folder, file)
        super().__init__(path, folder, digests)
        self._stored: dict[str, StoredTensor] = {}
        self._specs: dict[str, TensorSpec] = {}
        for file, found in self.contents.items():
            self._take(file, found)
        if nanochat.is_model(main):
            self.ignored_files = tuple(nanochat.optimizer_files(folder, main).values())

    def _take(self, file: str, found: Contents) -> None:
        where = str(self.folder.path / file)
        for name, tensor in weights_in(found, where):
            if not tensor.contiguous:
                raise FormatError(
                    f"{where}: the elements of {printable(name)} do not lie one after the other (shape "
                    f"{tensor.shape}, strides {tensor.stride}); save it again with .contiguous()"
                )
            self._add(TensorSpec(name=name, dtype=tensor.dtype, shape=tensor.shape), tensor, where)
        for name, tensor in others_in(found, where):
            if tensor.contiguous:
                self._add(spec_of(name, tensor), tensor, where)

    def _add(self, spec: TensorSpec, tensor: StoredTensor, where: str) -> None:
        if spec.name in self._specs:
            raise FormatError(f"{where}: {printable(spec.name)} occurs twice")
        self._stored[spec.name] = tensor
        self._specs[spec.name] = spec

    @property
    def is_indexed(self) -> bool:
        """Whether the tensors are in several files that an index lists."""
        return self.main == _INDEX_FILE

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        stored = self._stored[name]
        fragment = Fragment(
            tensor=name,
            file=stored.file,
            offset_bytes=stored.offset_bytes,
            length_bytes=self._specs[name].length_bytes,
            flat_start=0,
        )
        return (fragment,)

    @cached_property
    def layout_digest(self) -> str:
        # not of the pickles: they also hold the step
        rows = [
            f"{t.file} {t.offset_bytes} {t.dtype.name} {t.shape} {name!r}" for name, t in self._stored.items()
        ]
        return blake3("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()

    def side_files(self) -> Mapping[str, bytes]:
        if nanochat.is_model(self.main):
            return nanochat.side_files(self.folder, self.main)
        found = dict(side_files.read(self.folder.path)) if self.main != self.path.name else {}
        if self.main == _LITGPT_FILE:
            found |= side_files.read(self.folder.path)
            names = [name for name in _LITGPT_SIDE_FILES if (self.folder.path / name).is_file()]
            found |= {name: self.folder.read_whole(name, _LARGEST_SIDE_BYTES) for name in names}
        return found

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        """Entries of the files that a merge of `tensors` does not have."""
        return tuple(name for found in self.contents.values() for name in rebuilt(found, tensors).left_out)


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where an output's tensors go: into files as in `like`, with what else in them belongs to the weights;
    without `like` into one file, a bare state dict. Tensors that share storage in `like` each get their own.
    """
    if like is None:
        state = OrderedMapping()
        state.update(tensors)
        return Layout(tensors=dict(tensors), files=(_planned("model.pt", state),))
    reader = cast(TorchReader, like)
    files = [_planned(file, rebuilt(found, tensors).value) for file, found in reader.contents.items()]
    files = [file for file in files if file.fragments]
    records: dict[str, bytes] = {}
    if reader.is_indexed:
        records[_INDEX_FILE] = _index(tensors, files)
    return Layout(tensors=dict(tensors), files=tuple(files), records=records)


def _planned(file: str, value: object) -> OutputFile:
    try:
        return archive_layout(file, value)
    except CannotEncode as error:
        raise FormatError(f"{file} cannot be written as a file of torch.save: {error}") from error


def _index(tensors: Mapping[str, TensorSpec], files: Sequence[OutputFile]) -> bytes:
    index = {
        "metadata": {"total_size": sum(spec.length_bytes for spec in tensors.values())},
        "weight_map": dict(sorted((f.tensor, file.name) for file in files for f in file.fragments)),
    }
    return json.dumps(index, indent=2).encode("utf-8") + b"\n"


def _open(folder: Folder, file: str) -> tuple[Contents, str]:
    archive = read_archive(folder, file, records=RECORDS)
    return contents(archive.value, str(folder.path / file)), archive.digest


def _main_file(path: Path) -> str | None:
    """The file that a checkpoint's weights begin at, None where `path` is no checkpoint of this format."""
    if not path.is_dir():
        plain = path.suffix in _SUFFIXES and not _OTHERS.fullmatch(path.name)
        return path.name if plain and path.is_file() else None
    if (path / ".metadata").exists():
        return None
    for name in (_LITGPT_FILE, _INDEX_FILE, _BIN_FILE):
        if (path / name).is_file():
            return name
    found = [entry.name for entry in path.iterdir() if entry.suffix in _SUFFIXES and entry.is_file()]
    found = [name for name in found if not _OTHERS.fullmatch(name)]
    return found[0] if len(found) == 1 else None


def _shard_names(folder: Folder) -> list[str]:
    where = str(folder.path / _INDEX_FILE)
    index = parse_object(folder.read_whole(_INDEX_FILE, _LARGEST_INDEX_BYTES), where)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{where}: weight_map is missing or empty")
    for shard in set(map(str, weight_map.values())):
        # a name such as ../../etc/passwd or one with a separator must not lead out of the folder
        if (
            Path(shard).name != shard
            or "\\" in shard
            or not shard.isprintable()
            or not shard.endswith(".bin")
        ):
            raise FormatError(f"{where}: {printable(shard)!r} is not a plain name of a .bin file")
    return sorted(set(map(str, weight_map.values())))
