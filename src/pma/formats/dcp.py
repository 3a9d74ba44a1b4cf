"""PyTorch distributed checkpoints (DCP), as torchtitan, OLMo-core, accelerate, Composer and plain programs
save them.

A folder holds `.metadata`, written last, and `.distcp` files, in which every chunk of a tensor is an
archive of torch.save of its own. The folder may lie inside the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pma.errors import FormatError, IncompleteError, InputError
from pma.formats import hf_trainer, interval_mean
from pma.formats.contracts import CheckpointReader
from pma.formats.dcp_checkpoint import DcpReader
from pma.formats.dcp_layout import fresh, is_training, part_layout
from pma.formats.dcp_metadata import METADATA_FILE
from pma.formats.dcp_profiles import ACCELERATE, OLMO_CORE, WEIGHTS_ALONE, Profile, recognised
from pma.formats.folder import Folder
from pma.formats.torch_archive import read_archive
from pma.types import CheckpointMeta, Layout, TensorSpec

FORMAT = "dcp"
CHECKPOINT_NAME = re.compile(r"(?:step[-_]?|checkpoint[-_]|ep\d{1,18}-ba)(?P<step>\d{1,18})", re.ASCII)
_OLMO_FOLDER = "model_and_optim"
_OLMO_COMPLETE = ".metadata.json"
_OLMO_STATE = "train/rank0.pt"
_FSDP_FOLDER = "pytorch_model_fsdp_0"
_FSDP_OPTIMIZER = "optimizer_0"
#: what accelerate and the Trainer keep beside an FSDP checkpoint in order to resume, last what completes it
_TRAINER_FILES = ("scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth", "random_states_*.pkl")
_RECORD_FILE = "pma.json"  # a merge of ours is complete without training state
_LARGEST_STATE_BYTES = 256 * 2**20


def detect(path: Path) -> bool:
    """Whether `path` is a DCP folder or holds one where OLMo-core or accelerate put it, be it unfinished."""
    if not path.is_dir():
        return False
    folders = (path, path / _OLMO_FOLDER, path / _FSDP_FOLDER)
    return any((f / METADATA_FILE).is_file() or any(f.glob("*.distcp")) for f in folders if f.is_dir())


def open_reader(path: Path) -> Reader:
    """Open a checkpoint: parses its `.metadata`, reads no tensor."""
    return Reader(path, *_parts(path))


def open_mean(path: Path) -> Reader:
    """Open the folder of a stored mean (`interval_mean`) as part of the checkpoint it lies in."""
    reader = Reader(path.parent, (f"{path.name}/",), WEIGHTS_ALONE)
    reader.also(f"{path.name}/{interval_mean.RECORD_FILE}")
    return reader


def _parts(path: Path) -> tuple[tuple[str, ...], Profile | None]:
    """The folders of a checkpoint that are DCP's, and the profile where they tell it."""
    if (path / _OLMO_FOLDER).is_dir():
        return (f"{_OLMO_FOLDER}/",), OLMO_CORE
    if (path / _FSDP_FOLDER).is_dir():
        found = [name for name in (_FSDP_FOLDER, _FSDP_OPTIMIZER) if (path / name).is_dir()]
        return tuple(f"{name}/" for name in found), ACCELERATE
    return ("",), None


class Reader(DcpReader):
    """Reads one DCP checkpoint by position. Implements `CheckpointReader`."""

    format = FORMAT

    def recognise(self, names: Mapping[str, object]) -> Profile:
        return recognised(names.keys())

    def read_meta(self) -> CheckpointMeta:
        """What the trainer recorded."""
        if self.profile is ACCELERATE:
            return self._completed(hf_trainer.read_meta(self.path))
        if self.profile is OLMO_CORE:
            return self._completed(_olmo_meta(self))
        step = next(
            (n for n in (_count(_value(self, name)) for name in self.profile.step) if n is not None), None
        )
        tokens, source = None, self.profile.tokens_unreliable
        for name in self.profile.tokens:
            counted = _count(_value(self, name))
            if counted:  # 0 where the trainer does not count
                tokens, source = counted, name
        return self._completed(CheckpointMeta(step=step, tokens=tokens, tokens_source=source))

    def _completed(self, meta: CheckpointMeta) -> CheckpointMeta:
        """With the step of the folder's name and the optimizer's learning rate, where no other record has
        them.
        """
        named = CHECKPOINT_NAME.fullmatch(self.path.name)
        if meta.step is None and named is not None:
            meta = replace(meta, step=int(named["step"]))
        return _with_rate(meta, self)


def read_meta(path: Path) -> CheckpointMeta:
    """Step, tokens and learning rate as the trainer that wrote it records them.

    torchtitan's count of tokens is that of one rank, so it is not used.
    """
    try:
        reader = open_reader(path)
    except InputError as error:
        return CheckpointMeta(incomplete=str(error))
    try:
        return reader.read_meta()
    finally:
        reader.close()


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where each tensor of an output goes: chunks and files as in `like`; without it, whole tensors in
    files of some gigabytes.

    Training state beside the DCP folder goes along if tensors of it do.
    """
    if not isinstance(like, Reader):
        files, records = part_layout(fresh(tensors), "")
        return Layout(tensors=dict(tensors), files=tuple(files), records=records)
    files, records = [], {}
    for part in like.parts:
        wanted = {name: spec for name, spec in tensors.items() if like.home(name) is part}
        if wanted:
            made, record = part_layout(part.metadata, part.prefix, wanted)
            files += made
            records |= record
    resuming = any(is_training(spec) for spec in tensors.values())
    records |= dict(_beside(like, resuming))
    return Layout(tensors=dict(tensors), files=tuple(files), records=records)


def _beside(like: Reader, resuming: bool) -> Iterator[tuple[str, bytes]]:
    """Files that complete the checkpoint for the trainer it came from, copied unopened."""
    patterns: tuple[str, ...] = ()
    if like.profile is OLMO_CORE:
        patterns = (("train/rank*.pt",) if resuming else ()) + (_OLMO_COMPLETE,)
    elif like.profile is ACCELERATE and resuming:
        patterns = (*_TRAINER_FILES, hf_trainer.STATE_FILE)
    for pattern in patterns:
        for path in sorted(like.path.glob(pattern)):
            name = path.relative_to(like.path).as_posix()
            yield name, like.folder.read_whole(name, _LARGEST_STATE_BYTES)


def _olmo_meta(reader: Reader) -> CheckpointMeta:
    merged = (reader.path / _RECORD_FILE).is_file()
    needed = (_OLMO_COMPLETE,) if merged else (_OLMO_STATE, _OLMO_COMPLETE)
    for name in needed:
        if not (reader.path / name).is_file():
            return CheckpointMeta(incomplete=f"{name} is not there yet")
    state = _train_state(reader.folder) if not merged else {}
    step, tokens = _count(state.get("global_step")), _count(state.get("global_train_tokens_seen"))
    source = f"global_train_tokens_seen in {_OLMO_STATE}" if tokens is not None else None
    return CheckpointMeta(step=step, tokens=tokens, tokens_source=source)


def _train_state(folder: Folder) -> Mapping[str, Any]:
    try:
        value = read_archive(folder, _OLMO_STATE).value
    except FormatError:
        return {}  # a callback keeps something that is not known here; the step is in the folder's name
    return value if isinstance(value, dict) else {}


def _with_rate(meta: CheckpointMeta, reader: Reader) -> CheckpointMeta:
    if meta.learning_rate is not None:
        return meta
    for name in reader.profile.rates(reader.tensors.keys())[:4]:
        value = _value(reader, name)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, float) and 0 <= first < 1e6:
            return replace(meta, learning_rate=first)
    return meta


def _value(reader: Reader, name: str) -> Any:
    """A value of the training state; None where it is of a kind that is not read."""
    try:
        return reader.value(name)
    except IncompleteError:
        raise
    except FormatError:
        return None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None
