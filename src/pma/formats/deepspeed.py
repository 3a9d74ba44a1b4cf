"""DeepSpeed ZeRO checkpoints, stages 1 to 3: fp32 weights and moments, read where the ranks' parts lie.

A checkpoint is the folder of a tag (`global_step100`), or a folder with `latest` and one such folder in it,
as the Trainer and accelerate save. A merge is written as a universal checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.errors import FormatError, IncompleteError, InputError, printable
from pma.formats import deepspeed_universal, hf_trainer
from pma.formats.contracts import CheckpointReader
from pma.formats.deepspeed_files import read_model_states, read_optimizer_states
from pma.formats.deepspeed_layout import STEP, kind_of, moment_name
from pma.formats.deepspeed_partitions import (
    CutParameters,
    JoinedGroups,
    Vector,
    frozen_fragments,
    whole_fragment,
)
from pma.formats.deepspeed_states import (
    MASTERS,
    RANK_MODEL_FILE,
    ModelStates,
    OptimizerStates,
    TrainingState,
    by_rank,
    tensor_parallel,
)
from pma.formats.folder import Folder, open_folder
from pma.formats.reader import FileReader
from pma.formats.torch_archive import StoredTensor
from pma.formats.zip_directory import read_directory
from pma.types import CheckpointMeta, Fragment, Layout, Role, TensorSpec

FORMAT = "deepspeed"
CHECKPOINT_NAME = deepspeed_universal.CHECKPOINT_NAME
_OPTIMIZER_FILE = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_optim_states\.pt", re.ASCII
)
_WHOLE_MODEL_FILE = re.compile(r"mp_rank_(\d{1,9})_model_states\.pt", re.ASCII)
# of pipelines, of experts
_OTHER_FILE = re.compile(r"(?:layer_|expert_|expp_rank_).*_states\.pt", re.ASCII)
_LATEST = "latest"
_LARGEST_TAG_BYTES = 4096


def detect(path: Path) -> bool:
    """Whether `path` holds files as ZeRO names them, be it unfinished, or one folder that does beside
    `latest`.
    """
    return path.is_dir() and not deepspeed_universal.detect(path) and _tag_folder(path) is not None


def open_reader(path: Path) -> ZeroReader:
    """Open a checkpoint: reads directories and pickles, no tensor."""
    return ZeroReader(path)


def read_meta(path: Path) -> CheckpointMeta:
    """Step and learning rate by DeepSpeed's records; beside the Trainer's own, also what those say. What
    cannot be read is incomplete, with the reason.
    """
    inside = _tag_folder(path)
    if inside is None:
        return CheckpointMeta(incomplete="no weights are there yet")
    try:
        found = _meta(inside)
    except InputError as error:
        return CheckpointMeta(incomplete=str(error))
    trainer = hf_trainer.read_meta(path) if inside != path else CheckpointMeta()
    tokens = found if found.tokens is not None else trainer
    return replace(
        found,
        tokens=tokens.tokens,
        tokens_source=tokens.tokens_source,
        incomplete=found.incomplete or trainer.incomplete,
        log=trainer.log,
    )


def plan_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where an output's tensors go: as a universal checkpoint, which any count of ranks and stage resumes
    from.
    """
    return deepspeed_universal.plan_layout(tensors, like)


@dataclass(frozen=True, kw_only=True)
class _Names:
    """The files of a checkpoint, by rank."""

    optimizer: tuple[str, ...]
    model: tuple[str, ...]


class ZeroReader(FileReader):
    """Reads ZeRO's partitions by position. Implements `CheckpointReader`.

    Tensors are the fp32 masters under their parameters' names, parameters that are not trained and buffers
    as stored, the optimizer's moments as `optimizer.KIND.PARAMETER`, its counts of steps as
    `optimizer.step.PARAMETER`. Other names of shared parameters are not tensors of their own: see `shared`.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        inside = _tag_folder(path)
        if inside is None:
            raise FormatError(f"{path} holds no ZeRO checkpoint, or `latest` and several folders with one")
        folder = open_folder(inside)
        names = _names(folder)
        self._model = read_model_states(folder, names.model[0])
        ranks = [read_optimizer_states(folder, file) for file in names.optimizer]
        _check_ranks(inside, self._model, ranks)
        frozen_files = names.model if ranks[0].stage == 3 and self._model.frozen else names.model[:1]
        others = [read_model_states(folder, file) for file in frozen_files[1:]]
        files: list[ModelStates | OptimizerStates] = [self._model, *others, *ranks]
        super().__init__(path, folder, {file.file: file.digest for file in files})
        self.shared = self._model.shared
        self._first = ranks[0]
        self._partitions = _partitions(self._model, ranks, str(inside))
        self._vectors = self._vectors_of(ranks)
        stored = [t for rank in ranks for row in rank.vectors.values() for t in row]
        stored += [
            t for file in (self._model, *others) for t in (*file.buffers.values(), *file.frozen.values())
        ]
        self._stored_at = [f"{t.file} {t.offset_bytes} {t.element_count}" for t in stored]
        self._whole = frozen_fragments([self._model, *others], str(inside))
        self._whole |= {name: (whole_fragment(name, t),) for name, t in self._model.buffers.items()}

    def _vectors_of(self, ranks: Sequence[OptimizerStates]) -> dict[str, list[Vector]]:
        """By what they are: weights, and each moment."""
        kinds = list(ranks[0].vectors)
        for rank in ranks[1:]:
            for kind in rank.vectors.keys() ^ ranks[0].vectors.keys():
                raise FormatError(
                    f"{self.path}: {ranks[0].file} and {rank.file} differ in what the optimizer keeps: only "
                    f"one has {printable(kind)}"
                )
        for kind in kinds:
            if len({tensor.dtype for rank in ranks for tensor in rank.vectors[kind]}) > 1:
                raise FormatError(f"{self.path}: {printable(kind)} is of several types")
        return {kind: self._partitions.vectors([rank.vectors[kind] for rank in ranks]) for kind in kinds}

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        found: dict[str, TensorSpec] = {}
        for name, shape in self._model.shapes.items():
            dtype = self._first.vectors[MASTERS][0].dtype
            found[name] = TensorSpec(name=name, dtype=dtype, shape=shape)
        for name, shape in self._model.frozen_shapes.items():
            found[name] = TensorSpec(name=name, dtype=self._model.frozen[name].dtype, shape=shape)
        for name, tensor in self._model.buffers.items():
            found[name] = TensorSpec(name=name, dtype=tensor.dtype, shape=tensor.shape, role=Role.BUFFER)
        for spec in self._training_specs():
            if found.setdefault(spec.name, spec) is not spec:
                raise FormatError(f"{self.path}: {printable(spec.name)} occurs twice")
        return found

    def _training_specs(self) -> Iterator[TensorSpec]:
        for kind, tensors in self._first.vectors.items():
            for name, shape in self._model.shapes.items() if kind != MASTERS else ():
                yield TensorSpec(
                    name=moment_name(kind, name),
                    dtype=tensors[0].dtype,
                    shape=shape,
                    role=Role.MOMENT,
                    parameter=name,
                    kind=kind,
                )
        for name, step in self._steps.items():
            if isinstance(step, StoredTensor) and step.contiguous:
                stored = moment_name(STEP, name)
                yield TensorSpec(
                    name=stored,
                    dtype=step.dtype,
                    shape=step.shape,
                    role=Role.OTHER,
                    parameter=name,
                    kind=STEP,
                )

    @cached_property
    def _steps(self) -> dict[str, Any]:
        """Each parameter's count of steps, where it is recorded with its group."""
        groups, steps = self._model.groups, self._first.steps
        counted = steps if len(steps) == len(groups) else (steps[:1] or (None,)) * len(groups)
        return {name: step for group, step in zip(groups, counted, strict=True) for name in group}

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        if name in self._whole:
            return self._whole[name]
        spec = self.tensors[name]
        if spec.role is Role.OTHER:
            return (whole_fragment(name, self._steps[spec.parameter or ""]),)
        vectors = self._vectors[kind_of(spec)]
        places = self._partitions.places(spec.parameter or name)
        return tuple(part for place in places for part in vectors[place.row].fragments(name, place))

    @cached_property
    def layout_digest(self) -> str:
        # not of the pickles: they also hold the step
        rows = [f"{spec.dtype.name} {spec.shape} {name!r}" for name, spec in self.tensors.items()]
        return blake3("\n".join(self._stored_at + rows).encode("utf-8", "surrogatepass")).hexdigest()

    def training_state(self) -> TrainingState:
        """What else a trainer needs in order to go on from this checkpoint."""
        return TrainingState(
            trained=self._model.shapes.keys(),
            model=self._model.values,
            optimizer=self._first.values,
            groups=self._first.groups,
            steps=self._steps,
        )


def _tag_folder(path: Path) -> Path | None:
    """The folder that the files are in: `path`, or the only one in it that holds some, beside `latest`."""
    if _holds_files(path):
        return path
    if not (path / _LATEST).is_file():
        return None
    inside = [entry for entry in path.iterdir() if entry.is_dir() and _holds_files(entry)]
    return inside[0] if len(inside) == 1 else None


def _holds_files(folder: Path) -> bool:
    patterns = (_OPTIMIZER_FILE, _WHOLE_MODEL_FILE, RANK_MODEL_FILE)
    return any(pattern.fullmatch(entry.name) for entry in folder.glob("*_states.pt") for pattern in patterns)


def _names(folder: Folder) -> _Names:
    """The files of a checkpoint. Raises FormatError for parallelism that is not read, IncompleteError where
    a rank's file is missing.
    """
    names, where = folder.names(), str(folder.path)
    other = next((name for name in names if _OTHER_FILE.fullmatch(name)), None)
    if other is not None:
        raise FormatError(
            f"{where}: {printable(other)} belongs to a checkpoint of pipeline stages or of DeepSpeed's "
            "experts, which are not read; save the weights in Hugging Face's format and merge those"
        )
    optimizer = by_rank(names, _OPTIMIZER_FILE, where)
    model = by_rank(names, RANK_MODEL_FILE, where)
    if not model:
        model = tuple(name for name in names if _WHOLE_MODEL_FILE.fullmatch(name))
        if len(model) > 1 or (model and model[0] != "mp_rank_00_model_states.pt"):
            raise tensor_parallel(where, model[-1])
    if not model or not optimizer:
        missing = "model" if not model else "optimizer"
        raise IncompleteError(f"{where} has no file of {missing} states (yet)")
    return _Names(optimizer=optimizer, model=model)


def _check_ranks(folder: Path, model: ModelStates, ranks: Sequence[OptimizerStates]) -> None:
    """All ranks are there and tell the same story."""
    first = ranks[0]
    expected = {first.rank_count, model.rank_count if model.rank_count is not None else first.rank_count}
    if expected != {len(ranks)}:
        said = " or ".join(map(str, sorted(expected)))
        raise IncompleteError(f"{folder} has files of {len(ranks)} ranks; its records say {said}")
    for rank in ranks[1:]:
        same = rank.stage == first.stage and len(rank.vectors[MASTERS]) == len(first.vectors[MASTERS])
        kinds = {tensor.dtype for tensor in (*rank.vectors[MASTERS], *first.vectors[MASTERS])}
        if not same or len(kinds) > 1:
            raise FormatError(f"{folder}: {rank.file} and {first.file} are of different runs")
    shapes = model.shapes
    for name in (model.buffers.keys() | model.frozen.keys()) & shapes.keys() | (
        model.buffers.keys() & model.frozen.keys()
    ):
        raise FormatError(f"{folder}: {printable(name)} is a parameter, and also something else")
    for name, other in model.shared.items():
        if other not in shapes and other not in model.frozen:
            raise FormatError(f"{folder}: {printable(name)} shares memory with an unknown {printable(other)}")


def _partitions(
    model: ModelStates, ranks: Sequence[OptimizerStates], where: str
) -> JoinedGroups | CutParameters:
    counts = [[tensor.element_count for tensor in rank.vectors[MASTERS]] for rank in ranks]
    if ranks[0].stage == 3:
        return CutParameters(model.groups, counts, where)
    return JoinedGroups(model.groups, counts, ranks[0].alignments, where)


def _meta(folder_path: Path) -> CheckpointMeta:
    with closing(open_folder(folder_path)) as folder:
        names = _names(folder)
        model = read_model_states(folder, names.model[0])
        first = read_optimizer_states(folder, names.optimizer[0])
        if first.rank_count != len(names.optimizer):
            raise IncompleteError(f"files of {len(names.optimizer)} of {first.rank_count} ranks are there")
        for name in (*names.model[1:], *names.optimizer[1:]):
            # its zip directory stands at the end: a file that lacks it is cut short
            read_directory(folder, name, 0, folder.size_bytes(name))
    return replace(model.meta, learning_rate=first.learning_rate, incomplete=_unnamed(folder_path))


def _unnamed(folder: Path) -> str | None:
    """Why a checkpoint is not finished by `latest`, which DeepSpeed writes once every rank is done."""
    latest, named = folder.parent / _LATEST, CHECKPOINT_NAME.fullmatch(folder.name)
    if named is None or not latest.is_file() or latest.stat().st_size > _LARGEST_TAG_BYTES:
        return None
    tag = CHECKPOINT_NAME.fullmatch(latest.read_text("utf-8", "replace").strip())
    if tag is None or int(named["step"]) <= int(tag["step"]):
        return None
    return f"`{_LATEST}` names {tag[0]}, and DeepSpeed names a checkpoint there once every rank is done"
