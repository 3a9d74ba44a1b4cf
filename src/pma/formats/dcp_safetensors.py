"""What torch.distributed.checkpoint's Hugging Face writer leaves when it saves from every rank: safetensors
shards without an index, each tensor in pieces over them.

`shard-RRRRR-model-NNNNN-of-NNNNN.safetensors` is rank R's; where in the tensor its piece begins stands in
the header's `__metadata__`. A merge is written as ordinary safetensors. Source: torch 2.13,
`torch/distributed/checkpoint/{hf_storage,_hf_utils}.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pma.errors import FormatError, printable
from pma.formats import dcp, safetensors
from pma.formats.contracts import CheckpointReader
from pma.formats.dcp_boxes import check_cover
from pma.formats.folder import open_folder
from pma.formats.reader import FileReader
from pma.formats.safetensors_header import read_header
from pma.formats.strict_json import parse_object, refuse_above
from pma.types import CheckpointMeta, DType, Fragment, Layout, TensorSpec

FORMAT = "dcp-safetensors"
CHECKPOINT_NAME = dcp.CHECKPOINT_NAME
_SHARD = re.compile(r"shard-\d{5,9}-model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_SHARDING_KEY = "DCP_SHARDING_INFO"
_OFFSETS_KEY = "saved_offsets"
_LARGEST_END = 2**62
# about 40,000 tensors in one shard
_SHARDING_BUDGET_BYTES = 24 * 2**20


def detect(path: Path) -> bool:
    """Whether `path` is a folder of such shards, and nobody has put them together."""
    if not path.is_dir() or (path / safetensors.INDEX_FILE).is_file():
        return False
    return bool(_shards(path))


def open_reader(path: Path) -> Reader:
    """Open a checkpoint: parses every header, reads no tensor."""
    return Reader(path)


def read_meta(path: Path) -> CheckpointMeta:
    """The step in the folder's name; the writer records nothing."""
    named = CHECKPOINT_NAME.fullmatch(path.name)
    return CheckpointMeta(step=int(named["step"]) if named else None)


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Whole tensors in ordinary safetensors files with an index, which every reader of shards takes too."""
    return safetensors.plan_layout(tensors, None)


def _shards(path: Path) -> list[str]:
    return sorted(found.name for found in path.glob("shard-*.safetensors") if _SHARD.fullmatch(found.name))


class Reader(FileReader):
    """Reads shards of safetensors by position. Implements `CheckpointReader`."""

    format = FORMAT

    def __init__(self, path: Path) -> None:
        folder = open_folder(path)
        headers = {name: read_header(folder, name) for name in _shards(path)}
        super().__init__(path, folder, {name: header.digest for name, header in headers.items()})
        self._fragments: dict[str, list[Fragment]] = {}
        self._dtypes: dict[str, DType] = {}
        for file, header in headers.items():
            starts = _starts(header.metadata, f"{path / file}")
            for name, spec in header.tensors.items():
                if self._dtypes.setdefault(name, spec.dtype) is not spec.dtype:
                    raise FormatError(
                        f"{path / file}: {printable(name)} has another type than in another shard"
                    )
                fragment = Fragment(
                    tensor=name,
                    file=file,
                    offset_bytes=header.offsets_bytes[name],
                    length_bytes=spec.length_bytes,
                    box=(_start(starts, spec, f"{path / file}"), spec.shape),
                )
                self._fragments.setdefault(name, []).append(fragment)

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: self._whole(name, pieces) for name, pieces in self._fragments.items()}

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        _ = self.tensors  # checked
        return tuple(self._fragments[name])

    def _whole(self, name: str, pieces: list[Fragment]) -> TensorSpec:
        """A tensor put together. A shard that is missing at the end of a tensor cannot be noticed: the
        whole shape is recorded nowhere.
        """
        where = f"{self.path}: {printable(name)}"
        boxes = [piece.box for piece in pieces if piece.box is not None]
        if len({len(sizes) for _, sizes in boxes}) != 1:
            raise FormatError(f"{where} has pieces of different numbers of dimensions")
        starts_CD, sizes_CD = (np.array([box[i] for box in boxes], np.int64) for i in range(2))
        ends_CD = starts_CD + sizes_CD
        shape = tuple(int(size) for size in ends_CD.max(axis=0)) if ends_CD.shape[1] else ()
        held_C = np.all(sizes_CD > 0, axis=1) if 0 not in shape else np.arange(len(boxes)) == 0
        self._fragments[name] = [piece for piece, held in zip(pieces, held_C.tolist(), strict=True) if held]
        check_cover(shape, starts_CD[held_C], sizes_CD[held_C], where)
        return TensorSpec(name=name, dtype=self._dtypes[name], shape=shape)


def _starts(metadata: Mapping[str, str], where: str) -> Mapping[str, Any]:
    text = metadata.get(_SHARDING_KEY)
    if text is None:
        raise FormatError(
            f"{where}: {_SHARDING_KEY} is missing, so it cannot be told where its pieces belong"
        )
    data = text.encode("utf-8", "surrogatepass")
    refuse_above(_SHARDING_BUDGET_BYTES, data, f"{where}: {_SHARDING_KEY}")
    return parse_object(data, f"{where}: {_SHARDING_KEY}")


def _start(starts: Mapping[str, Any], spec: TensorSpec, where: str) -> tuple[int, ...]:
    entry = starts.get(spec.name)
    found = entry.get(_OFFSETS_KEY) if isinstance(entry, dict) else None
    if not isinstance(found, list) or len(found) != len(spec.shape) or not all(map(_is_count, found)):
        raise FormatError(f"{where}: it is not said where {printable(spec.name)} begins")
    if any(start + size >= _LARGEST_END for start, size in zip(found, spec.shape, strict=True)):
        raise FormatError(f"{where}: where {printable(spec.name)} ends is not believable")
    return tuple(found)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
