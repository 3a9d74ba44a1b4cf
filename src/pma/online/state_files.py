"""A recorder's state in a checkpoint's folder, for trainers whose checkpoints have no place for it.

One process or replicas: `pma_recorder/state.safetensors`, with the record in its metadata. Sharded: the
folder is one of torch.distributed.checkpoint, with `pma_recorder.json` written last. Neither is a pickle of
ours.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma.formats.dcp import open_reader
from pma.formats.folder import open_folder
from pma.formats.safetensors_header import read_header
from pma.online.keeping import Kept
from pma.online.ranks import as_dtensor
from pma.online.storing import need_folder, write_file, write_shards

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
    folder = checkpoint / STATE_FOLDER
    sharded, file = (folder / RECORD_FILE).is_file(), folder / STATE_FILE
    if sharded:
        with closing(open_folder(folder)) as opened:
            text = opened.read_whole(RECORD_FILE, _LARGEST_RECORD_BYTES).decode("utf-8", "replace")
        kept.check_record(text, str(folder))  # also where this model is not sharded: it says so
        tensors = _read_shards(kept, folder, on_cpu)
        kept.load_state_dict({"record": text, "tensors": tensors}, on_cpu, str(folder))
    elif file.is_file():
        record, tensors = read_file(file) if kept.ranks.records else (_record_of(file), {})
        kept.load_state_dict({"record": record, "tensors": tensors}, on_cpu, str(file))
    return sharded or file.is_file()


def read_file(path: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """The record and the tensors of a state file. Raises FormatError, IncompleteError."""
    import torch

    tensors = {}
    with closing(open_folder(path.parent)) as folder:
        header = read_header(folder, path.name)
        for name, spec in header.tensors.items():
            dtype: Any = getattr(torch, "complex64" if spec.dtype.kind == "complex" else "float32")
            tensor = torch.empty(spec.shape, dtype=dtype)
            if spec.dtype.bits != tensor.element_size() * 8:
                continue  # not of a recorder; it will be missed
            if spec.length_bytes:
                room: Any = tensor.view(-1).view(torch.uint8).numpy()
                folder.read(path.name, header.offsets_bytes[name], [memoryview(room)])
            tensors[name] = tensor
    return header.metadata.get(_METADATA_KEY), tensors


def _record_of(path: Path) -> str | None:
    with closing(open_folder(path.parent)) as folder:
        return read_header(folder, path.name).metadata.get(_METADATA_KEY)


def _read_shards(kept: Kept, folder: Path, on_cpu: bool) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    with closing(
        open_reader(folder)
    ) as reader:  # torch unpickles the metadata; ours does so by a list of names
        stored = set(reader.tensors)
    into = {name: t for name, t in kept.state_dict(on_cpu)["tensors"].items() if name in stored}
    load: Any = dcp.load  # type: ignore[attr-defined]
    load(into, checkpoint_id=str(folder))
    return into
