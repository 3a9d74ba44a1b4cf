"""A recorder's state in a checkpoint's folder, for trainers whose checkpoints have no place for it.

One process or replicas: `pma_recorder/state.safetensors`, with the record in its metadata. Sharded: the
folder is one of torch.distributed.checkpoint, with `pma_recorder.json` written last. Neither is a pickle of
ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma.errors import FormatError, printable
from pma.formats.dcp import open_reader
from pma.formats.folder import open_folder
from pma.formats.safetensors_header import read_header
from pma.online.keeping import Kept
from pma.online.ranks import as_dtensor
from pma.online.storing import need_folder, write_file, write_shards
from pma.types import DType

if TYPE_CHECKING:
    import torch

STATE_FOLDER = "pma_recorder"
STATE_FILE = "state.safetensors"
RECORD_FILE = "pma_recorder.json"
_METADATA_KEY = "pma_recorder"
_LARGEST_RECORD_BYTES = 64 * 2**20


def save_state(kept: Kept, checkpoint: Path) -> Path | None:
    """Write the groups that have values. Returns the folder; None on ranks that write nothing."""
    need_folder(checkpoint, "the recorder's state")
    folder = checkpoint / STATE_FOLDER
    tensors = {
        prefix + entry.name: as_dtensor(part, entry.live)
        for prefix, group, filled in kept.groups()
        if filled
        for entry, part in zip(kept.entries, group, strict=True)
    }
    if kept.ranks.sharded:
        write_shards(tensors, folder, (RECORD_FILE, kept.encoded()))
        return folder
    if not kept.ranks.records:
        return None
    folder.mkdir(exist_ok=True)
    write_file(tensors, {_METADATA_KEY: kept.encoded()}, folder / STATE_FILE)
    return folder


def load_state(kept: Kept, checkpoint: Path, on_cpu: bool) -> bool:
    """Take over what lies in the checkpoint's folder; False where nothing does."""
    record, folder = stored_record(checkpoint), checkpoint / STATE_FOLDER
    if record is None:
        return False
    kept.check_record(record, str(folder))  # before anything is read into this model's shapes
    if kept.ranks.sharded:
        tensors = _read_shards(folder, kept.state_dict(on_cpu)["tensors"])
    else:
        tensors = _read_file(folder / STATE_FILE, None) if kept.ranks.records else {}
    kept.load_state_dict({"record": record, "tensors": tensors}, on_cpu, str(folder))
    return True


def stored_record(checkpoint: Path) -> str | None:
    """The record of the state in a checkpoint's folder; None where there is no (whole) state."""
    folder = checkpoint / STATE_FOLDER
    if (folder / RECORD_FILE).is_file():
        with closing(open_folder(folder)) as opened:
            return opened.read_whole(RECORD_FILE, _LARGEST_RECORD_BYTES).decode("utf-8", "replace")
    if not (folder / STATE_FILE).is_file():
        return None
    with closing(open_folder(folder)) as opened:
        return read_header(opened, STATE_FILE).metadata.get(_METADATA_KEY, "")


def read_tensors(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Whole tensors of a state by name, also of a sharded one. Raises FormatError where one is missing."""
    import torch

    folder = checkpoint / STATE_FOLDER
    if (folder / RECORD_FILE).is_file():
        found = _read_shards(folder, {name: torch.empty(shape) for name, shape in shapes.items()}, alone=True)
    else:
        found = _read_file(folder / STATE_FILE, shapes)
    for name, shape in shapes.items():
        if name not in found or tuple(found[name].shape) != shape:
            raise FormatError(f"{folder}: {printable(name)} of shape {shape} is missing")
    return found


def _read_file(path: Path, wanted: Container[str] | None) -> dict[str, torch.Tensor]:
    import torch

    tensors = {}
    with closing(open_folder(path.parent)) as folder:
        header = read_header(folder, path.name)
        for name, spec in header.tensors.items():
            dtype: Any = {DType.F32: torch.float32, DType.C64: torch.complex64}.get(spec.dtype)
            if dtype is None or (wanted is not None and name not in wanted):
                continue  # if it was of the recorder it will be missed
            tensors[name] = torch.empty(spec.shape, dtype=dtype)
            if spec.length_bytes:
                room: Any = tensors[name].view(-1).view(torch.uint8).numpy()
                folder.read(path.name, header.offsets_bytes[name], [memoryview(room)])
    return tensors


def _read_shards(folder: Path, into: Mapping[str, Any], *, alone: bool = False) -> dict[str, Any]:
    """Those of `into` that are stored, filled. `alone`: by one process, whatever number wrote them."""
    import torch.distributed.checkpoint as dcp

    # torch unpickles the metadata; our reader, which looks names up in a list, goes first
    with closing(open_reader(folder)) as reader:
        found = {name: tensor for name, tensor in into.items() if name in reader.tensors}
    load: Any = dcp.load  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", message=".*single process", category=UserWarning)  # as intended
        load(found, checkpoint_id=str(folder), no_dist=alone)
    return found
