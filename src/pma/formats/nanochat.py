"""What nanochat keeps beside its weights: `model_000100.pt` goes with `meta_000100.json`, written after it,
and `optim_000100_rank0.pt`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pma.errors import FormatError
from pma.formats.folder import Folder
from pma.formats.strict_json import load_object
from pma.types import CheckpointMeta

_MODEL = re.compile(r"model_(\d{6,18})\.pt", re.ASCII)
_LARGEST_META_BYTES = 16 * 2**20
_LARGEST_COUNT = 2**63


def is_model(file: str) -> bool:
    """Whether a file is named as nanochat names its weights."""
    return _MODEL.fullmatch(file) is not None


def meta_file(file: str) -> str:
    """The record that goes with a file of weights."""
    return f"meta_{file.removeprefix('model_').removesuffix('.pt')}.json"


def read_meta(folder: Path, file: str) -> CheckpointMeta:
    """Step and tokens by the record; without a record the checkpoint is being written."""
    name = meta_file(file)
    if not (folder / name).is_file():
        return CheckpointMeta(incomplete=f"{name} is not there yet, and nanochat writes it after the weights")
    try:
        meta = load_object(folder / name, _LARGEST_META_BYTES)
    except FormatError as error:
        return CheckpointMeta(incomplete=f"{name} is being written, or damaged ({error})")
    step, batch = _count(meta.get("step")), _batch_tokens(meta)
    tokens = step * batch if step is not None and batch else None
    return CheckpointMeta(
        step=step, tokens=tokens, tokens_source=f"step × total_batch_size in {name}" if tokens else None
    )


def optimizer_files(folder: Folder, file: str) -> dict[str, str]:
    """The optimizer's shards of the same step, by their names without it, such as `optim_rank0`."""
    start = f"optim_{file.removeprefix('model_').removesuffix('.pt')}"
    names = [name for name in folder.names() if name.startswith(start) and name.endswith(".pt")]
    return {f"optim{name.removeprefix(start).removesuffix('.pt')}": name for name in names}


def side_files(folder: Folder, file: str) -> dict[str, bytes]:
    """The record, without which nanochat cannot build the model."""
    name = meta_file(file)
    if not (folder.path / name).is_file():
        return {}
    return {name: folder.read_whole(name, _LARGEST_META_BYTES)}


def _batch_tokens(meta: dict[str, Any]) -> int | None:
    """Tokens a step, from the run's own settings; nanochat's -1 (let it choose) is not a count."""
    settings = meta.get("user_config")
    for place in (meta, settings if isinstance(settings, dict) else {}):
        found = _count(place.get("total_batch_size"))
        if found:
            return found
    return None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST_COUNT else None
