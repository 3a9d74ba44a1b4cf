"""Writes tensors and a record beside a checkpoint: one safetensors file, or shards by
torch.distributed.checkpoint. Each appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma.errors import SpaceError, StorageError, UsageError
from pma.formats.files import NO_ROOM, sync_folder
from pma.formats.safetensors_header import encode_header
from pma.formats.torch_archive import TORCH_DTYPES
from pma.types import TensorSpec

if TYPE_CHECKING:
    import torch


def write_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """A safetensors file at `path`, written beside it and renamed. Raises SpaceError, StorageError."""
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    specs = [_spec(name, tensor) for name, tensor in tensors.items()]
    # widest first, so that every tensor is aligned; the same averages are the same file
    specs.sort(key=lambda spec: (-spec.dtype.bits, spec.name))
    try:
        with beside.open("wb") as file:
            file.write(encode_header(specs, {"format": "pt", **metadata}))
            for spec in specs:
                file.write(_bytes(tensors[spec.name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        kind = SpaceError if error.errno in NO_ROOM else StorageError
        raise kind(f"{path} could not be written: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_shards(tensors: Mapping[str, Any], folder: Path, record: tuple[str, str]) -> None:
    """A folder of torch.distributed.checkpoint, each rank its shards; then `record` (a file's name and text)
    by rank 0. Every rank calls it with the same path.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    beside = folder.parent / f".{folder.name}.unfinished"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(beside, ignore_errors=True)  # an attempt that was killed
    dist.barrier()
    save: Any = dcp.save  # type: ignore[attr-defined]
    save(dict(tensors), checkpoint_id=str(beside))
    if first:
        name, text = record
        with (beside / name).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(beside)
        if folder.exists():
            shutil.rmtree(folder)  # of an earlier attempt at the same checkpoint
        os.rename(beside, folder)
        sync_folder(folder.parent)
    dist.barrier()


def need_folder(path: Path, what: str) -> None:
    """Raises UsageError unless the folder that `what` goes into is there."""
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: the checkpoint is saved first, {what} then goes beside it")


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    dtype = TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")]
    return TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(raw)
