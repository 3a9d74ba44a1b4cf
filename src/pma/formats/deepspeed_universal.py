"""DeepSpeed's universal checkpoints: every parameter whole, in files of its own, for any count of ranks
and any stage to resume from.

`zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt`, `zero/optimizer_state.pt`, and the model's file. A run has
`latest_universal`, which names the newest. Source: deepspeed 0.19.8, `checkpoint/ds_to_universal.py`,
`checkpoint/universal_checkpoint.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.errors import FormatError, IncompleteError, InputError, printable
from pma.formats.contracts import CheckpointReader
from pma.formats.deepspeed_files import RECORDS, read_model_states
from pma.formats.deepspeed_layout import (
    MODEL_FILES,
    OPTIMIZER_FILE,
    PARAMETERS,
    STEP,
    UNIVERSAL_LATEST,
    moment_name,
    universal_layout,
)
from pma.formats.deepspeed_partitions import frozen_fragments, whole_fragment
from pma.formats.deepspeed_states import (
    MASTERS,
    RANK_MODEL_FILE,
    Shape,
    TrainingState,
    by_rank,
    tensor_parallel,
)
from pma.formats.files import is_inside
from pma.formats.folder import Folder, open_folder
from pma.formats.reader import FileReader
from pma.formats.torch_archive import StoredTensor, read_archive
from pma.types import CheckpointMeta, Fragment, Layout, Role, TensorSpec

FORMAT = "deepspeed-universal"
#: formats whose readers tell a layout the training state to carry
LIKE = ("deepspeed", FORMAT)
CHECKPOINT_NAME = re.compile(r"global_step(?P<step>\d{1,18})(?:_universal)?", re.ASCII)
_PARAM = "param"
_SUFFIX = ".pt"

__all__ = [
    "CHECKPOINT_NAME",
    "FORMAT",
    "LIKE",
    "UniversalReader",
    "detect",
    "open_reader",
    "plan_layout",
    "read_meta",
]


def detect(path: Path) -> bool:
    """Whether `path` holds a folder of parameters beside DeepSpeed's files, be it unfinished."""
    if not (path / PARAMETERS).is_dir():
        return False
    names = (*MODEL_FILES, UNIVERSAL_LATEST, OPTIMIZER_FILE)
    return any((path / name).is_file() for name in names) or CHECKPOINT_NAME.fullmatch(path.name) is not None


def open_reader(path: Path) -> UniversalReader:
    """Open a checkpoint: reads directories and pickles, no tensor."""
    return UniversalReader(path)


def read_meta(path: Path) -> CheckpointMeta:
    """Step and learning rate by DeepSpeed's records. What cannot be read is incomplete, with the reason."""
    try:
        with closing(open_folder(path)) as folder:
            model = read_model_states(folder, _model_file(path))
            values = _optimizer_values(folder)[0]
            for name in model.shapes:
                folder.size_bytes(_file_of(name, MASTERS, str(path)))
    except InputError as error:
        return CheckpointMeta(incomplete=str(error))
    groups = _groups(values)
    rate = groups[0].get("lr") if groups else None
    return replace(
        model.meta, learning_rate=rate if isinstance(rate, float) and math.isfinite(rate) else None
    )


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where an output's tensors go; see `deepspeed_layout`."""
    return universal_layout(tensors, like)


class UniversalReader(FileReader):
    """Reads the tensors of a universal checkpoint by position. Implements `CheckpointReader`.

    Tensors are named as those of ZeRO's reader.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        folder = open_folder(path)
        self._model = read_model_states(folder, _model_file(path))
        self._optimizer, digest = _optimizer_values(folder)
        digests = {self._model.file: self._model.digest, OPTIMIZER_FILE: digest}
        self._parts: dict[str, tuple[Fragment, ...]] = {}
        self._specs: dict[str, TensorSpec] = {}
        # stage 3's converter writes one count for all
        self._steps: dict[str, Any] = dict.fromkeys(self._model.shapes, _common_step(self._optimizer))
        self._beside: dict[str, Mapping[str, Any]] = {}
        self._digests = digests
        for name, shape in self._model.shapes.items():
            for kind in _kinds(path, name):
                self._take(folder, name, shape, kind)
        self._take_whole(folder)
        super().__init__(path, folder, digests)
        self.shared = self._model.shared

    def _take(self, folder: Folder, name: str, shape: Shape, kind: str) -> None:
        """One file of a parameter."""
        file = _file_of(name, kind, str(folder.path))
        archive = read_archive(folder, file, records=RECORDS)
        value, where = archive.value, str(folder.path / file)
        self._digests[file] = archive.digest
        if kind == STEP:
            self._steps[name] = value
            if isinstance(value, StoredTensor) and value.contiguous:
                self._add(moment_name(STEP, name), value, value.shape, Role.OTHER, name, STEP)
            return
        tensor = value.get(_PARAM) if isinstance(value, dict) else value
        if not isinstance(tensor, StoredTensor):
            raise FormatError(f"{where} holds no tensor; expected one, alone or as {_PARAM!r}")
        if not tensor.contiguous and kind != MASTERS:
            return  # one zero for all: moments that have not begun
        if not tensor.contiguous or tensor.shape not in (shape, (math.prod(shape),)):
            raise FormatError(
                f"{where}: it has shape {tensor.shape}, expected {shape} as in {self._model.file}"
            )
        if kind == MASTERS:
            self._add(name, tensor, shape, Role.PARAMETER, None)
            self._beside[name] = (
                {k: v for k, v in value.items() if k != _PARAM} if isinstance(value, dict) else {}
            )
        else:
            self._add(moment_name(kind, name), tensor, shape, Role.MOMENT, name, kind)

    def _take_whole(self, folder: Folder) -> None:
        """What the model's file holds: buffers, and parameters that are not trained, which stage 3 cuts among
        the files of all ranks.
        """
        for name in self._model.values["buffer_names"]:
            if name not in self._model.buffers:
                raise IncompleteError(
                    f"{folder.path / self._model.file} names buffer {printable(str(name))} and does not hold "
                    f"it; {MODEL_FILES[0]} may be missing"
                )
        for name, tensor in self._model.buffers.items():
            self._add(name, tensor, tensor.shape, Role.BUFFER, None)
        names = by_rank(folder.names(), RANK_MODEL_FILE, str(folder.path)) if self._model.frozen else ()
        whole = self._model.file not in names
        others = [] if whole else [read_model_states(folder, name) for name in names[1:]]
        self._digests |= {other.file: other.digest for other in others}
        self._parts |= frozen_fragments([self._model, *others], str(folder.path))
        for name, shape in self._model.frozen_shapes.items():
            self._add(name, self._model.frozen[name], shape, Role.PARAMETER, None)

    def _add(
        self,
        name: str,
        tensor: StoredTensor,
        shape: Shape,
        role: Role,
        parameter: str | None,
        kind: str | None = None,
    ) -> None:
        if name in self._specs:
            raise FormatError(f"{self._model.file}: {printable(name)} occurs twice")
        self._parts.setdefault(name, (whole_fragment(name, tensor),))
        self._specs[name] = TensorSpec(
            name=name, dtype=tensor.dtype, shape=shape, role=role, parameter=parameter, kind=kind
        )

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        return self._parts[name]

    @cached_property
    def layout_digest(self) -> str:
        # not of the pickles: they also hold the step
        rows = [f"{spec.dtype.name} {spec.shape} {self._parts[name]}" for name, spec in self._specs.items()]
        return blake3("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()

    def training_state(self) -> TrainingState:
        """What else a trainer needs in order to go on from this checkpoint."""
        return TrainingState(
            trained=self._model.shapes.keys(),
            model=self._model.values,
            optimizer={k: v for k, v in self._optimizer.items() if k not in _GROUP_KEYS},
            groups=_groups(self._optimizer),
            steps=self._steps,
            beside=self._beside,
        )


_GROUP_KEYS = ("param_groups", "optimizer_state_dict", "fp32_flat_groups")


def _model_file(path: Path) -> str:
    other = next(
        (name for name in sorted(path.glob("mp_rank_*_model_states.pt")) if name.name != MODEL_FILES[0]), None
    )
    if other is not None:
        raise tensor_parallel(str(path), other.name)
    name = next((name for name in MODEL_FILES if (path / name).is_file()), None)
    if name is None:
        raise IncompleteError(f"{path} has no file of model states (yet), such as {MODEL_FILES[0]}")
    return name


def _file_of(name: str, kind: str, where: str) -> str:
    """A parameter's file, which may not lead out of the folder."""
    if "/" in name or not is_inside(name):
        raise FormatError(f"{where}: {printable(name)!r} cannot be the name of a folder")
    return f"{PARAMETERS}/{name}/{kind}{_SUFFIX}"


def _kinds(path: Path, name: str) -> Iterator[str]:
    """What there is of a parameter, its weights first."""
    folder = (path / _file_of(name, MASTERS, str(path))).parent
    names = sorted(entry.stem for entry in folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
    if MASTERS not in names:
        raise IncompleteError(f"{folder} has no {MASTERS}{_SUFFIX} (yet)")
    yield MASTERS
    yield from (kind for kind in names if kind != MASTERS)


def _optimizer_values(folder: Folder) -> tuple[Mapping[str, Any], str]:
    archive = read_archive(folder, OPTIMIZER_FILE, records=RECORDS)
    if not isinstance(archive.value, dict):
        raise FormatError(f"{folder.path / OPTIMIZER_FILE} holds no mapping")
    return archive.value, archive.digest


def _common_step(values: Mapping[str, Any]) -> Any:
    inner = values.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, dict) else None
    first = states.get(0) if isinstance(states, dict) else None
    return first.get(STEP) if isinstance(first, dict) else None


def _groups(values: Mapping[str, Any]) -> list[Any]:
    groups = values.get("param_groups")
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
