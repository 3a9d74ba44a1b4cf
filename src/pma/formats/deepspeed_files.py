"""Reads the files of a DeepSpeed checkpoint, one of model states or a rank's of optimizer states, and checks
what they say.

Source: deepspeed 0.19.8 (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`,
`utils/zero_to_fp32.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pma.errors import FormatError, printable
from pma.formats.deepspeed_states import LARGEST_COUNT, MASTERS, ModelStates, OptimizerStates, Shape, count_of
from pma.formats.folder import Folder
from pma.formats.torch_archive import StoredTensor, read_archive
from pma.formats.unpickling import Record

#: classes that these files hold, read as inert records
RECORDS = (
    "argparse.Namespace",  # Megatron-DeepSpeed's arguments
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_STEP = "step"
# members of ZeroStageEnum by value, and by name
_STAGES = {1: 1, 2: 2, 3: 3, "optimizer_states": 1, "gradients": 2, "weights": 3}
_FLAT_BY_STAGE = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
_FLAT_STAGE_3 = "fp32_flat_groups"
# what is cut among the ranks, or stands elsewhere in what we write
_SHARDED = frozenset(
    {"base_optimizer_state", "optimizer_state_dict", "param_slice_mappings", _FLAT_STAGE_3, _FLAT_BY_STAGE[1]}
)
_MOST_DIMENSIONS = 64


def read_model_states(folder: Folder, file: str) -> ModelStates:
    """Read a file of model states; no tensor's bytes are read. Raises FormatError, IncompleteError."""
    where = str(folder.path / file)
    archive = read_archive(folder, file, records=RECORDS)
    values = _mapping(archive.value, where, "it")
    module = _mapping(values.get("module"), where, "module")
    groups = _groups(values.get("param_shapes"), where)
    shared = _texts(values.get("shared_params") or {}, where)
    names = {name for group in groups for name in group}
    buffer_names = values.get("buffer_names")
    if not isinstance(buffer_names, (list, tuple)) or not all(isinstance(n, str) for n in buffer_names):
        raise FormatError(f"{where}: buffer_names is no list of names; it is no file of model states")
    frozen = _frozen(values, where)
    if not frozen and not _placeholders(module, names):
        # stage 1 stores parameters that are not trained only among the model's
        known = names | shared.keys() | set(buffer_names)
        others = {n: t for n, t in module.items() if isinstance(n, str) and n not in known}
        frozen = {n: (t.shape, t) for n, t in others.items() if _is_tensor(t)}
    return ModelStates(
        file=file,
        digest=archive.digest,
        values=values,
        groups=groups,
        buffers={n: module[n] for n in buffer_names if _is_tensor(module.get(n))},
        shared={name: other for name, other in shared.items() if name not in names},
        frozen_shapes={name: shape for name, (shape, _) in frozen.items()},
        frozen={name: tensor for name, (_, tensor) in frozen.items()},
    )


def read_optimizer_states(folder: Folder, file: str) -> OptimizerStates:
    """Read one rank's file; no tensor's bytes are read. Raises FormatError, IncompleteError."""
    where = str(folder.path / file)
    archive = read_archive(folder, file, records=RECORDS)
    outer = _mapping(archive.value, where, "it")
    values = _mapping(outer.get("optimizer_state_dict"), where, "optimizer_state_dict")
    stage = _stage(values, where)
    flat = _tensors(values.get(_FLAT_BY_STAGE.get(stage, _FLAT_STAGE_3)), where)
    inner = values.get("base_optimizer_state" if stage < 3 else "optimizer_state_dict")
    states, groups = _inner_states(inner, len(flat), where)
    return OptimizerStates(
        file=file,
        digest=archive.digest,
        stage=stage,
        rank_count=_rank_count(values.get("partition_count"), where),
        vectors={MASTERS: flat, **_moments(states, flat, where)},
        steps=tuple(state.get(_STEP, values.get("base_optimizer_state_step")) for state in states),
        alignments=_alignments(values.get("param_alignment_paddings"), where) if stage < 3 else None,
        groups=groups,
        values={key: value for key, value in values.items() if key not in _SHARDED},
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor)


def _mapping(value: Any, where: str, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: {what} is a {printable(type(value).__name__)}, expected a mapping as DeepSpeed saves"
        )
    return value


def _texts(value: Any, where: str) -> Mapping[str, str]:
    found = _mapping(value, where, "shared_params")
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise FormatError(f"{where}: shared_params holds something else than names")
    return found


def _shapes(value: Any, where: str) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, shape in _mapping(value, where, "a group of shapes").items():
        counts = isinstance(shape, tuple) and len(shape) <= _MOST_DIMENSIONS
        if not isinstance(name, str) or not counts or any(count_of(n) is None for n in shape):
            raise FormatError(f"{where}: the shape of {printable(str(name))} is no list of counts")
        if math.prod(shape) >= LARGEST_COUNT:
            raise FormatError(f"{where}: {printable(name)} has a shape that is not believable: {shape}")
        found[name] = tuple(shape)
    return found


def _groups(value: Any, where: str) -> tuple[Mapping[str, Shape], ...]:
    """`param_shapes`: a mapping a group; older versions had one for all."""
    rows = [value] if isinstance(value, dict) else value
    if not isinstance(rows, list) or not rows:
        raise FormatError(
            f"{where}: param_shapes is missing, so this is no ZeRO checkpoint; of stage 0, save the model's "
            "state_dict instead"
        )
    groups = tuple(_shapes(row, where) for row in rows)
    if len({name for group in groups for name in group}) < sum(map(len, groups)):
        raise FormatError(f"{where}: a parameter occurs twice in param_shapes")
    return groups


def _frozen(values: Mapping[Any, Any], where: str) -> dict[str, tuple[Shape, StoredTensor]]:
    shapes = _shapes(values.get("frozen_param_shapes") or {}, where)
    stored = _mapping(values.get("frozen_param_fragments") or {}, where, "frozen_param_fragments")
    for name in shapes.keys() ^ stored.keys():
        raise FormatError(f"{where}: frozen parameter {printable(str(name))} has a shape or values, not both")
    if not all(_is_tensor(tensor) for tensor in stored.values()):
        raise FormatError(f"{where}: frozen_param_fragments holds something else than tensors")
    return {name: (shape, stored[name]) for name, shape in shapes.items()}


def _placeholders(module: Mapping[Any, Any], names: set[str]) -> bool:
    """Whether the model's parameters are stored empty, as stage 3 does."""
    return any(_is_tensor(module.get(name)) and module[name].shape == (0,) for name in names)


def _stage(values: Mapping[Any, Any], where: str) -> int:
    stage = values.get("zero_stage")
    if stage is None and _FLAT_BY_STAGE[1] in values:
        return 1  # DeepSpeed's optimizer for bf16 with fp32 gradients does not write it
    if isinstance(stage, Record):
        (member,) = stage.args if len(stage.args) == 1 else (None,)
        stage = _STAGES.get(member) if isinstance(member, int | str) else None
    if stage not in (1, 2, 3):
        raise FormatError(f"{where}: ZeRO stage {printable(str(stage))}; stages 1, 2 and 3 are read")
    return int(stage)


def _rank_count(value: Any, where: str) -> int:
    counts = [count_of(each) for each in (value if isinstance(value, list) else [value])]
    if None in counts or not counts:
        raise FormatError(f"{where}: partition_count is no count of ranks")
    if len(set(counts)) > 1:
        raise FormatError(
            f"{where}: groups are cut among different counts of ranks, {counts}, as DeepSpeed does with "
            "experts; such checkpoints are not read"
        )
    return counts[0] or 0


def _tensors(value: Any, where: str) -> tuple[StoredTensor, ...]:
    if not isinstance(value, (list, tuple)) or not all(_is_tensor(tensor) for tensor in value):
        raise FormatError(f"{where}: the fp32 weights are missing; it is no file of ZeRO optimizer states")
    for tensor in value:
        if tensor.dtype.kind != "float" or not tensor.contiguous:
            raise FormatError(f"{where}: a flat vector of weights is not of floating numbers in a row")
    return tuple(value)


def _inner_states(value: Any, group_count: int, where: str) -> tuple[list[Mapping[Any, Any]], Sequence[Any]]:
    """The state of each flat vector, and the parameter groups, of the optimizer inside ZeRO's."""
    groups: Any = []
    if isinstance(value, dict):
        groups = value.get("param_groups")
        value = value.get("state")
    by_number = dict(enumerate(value)) if isinstance(value, list) else value
    plain = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not isinstance(by_number, dict) or not plain:
        raise FormatError(f"{where}: the optimizer's own state is missing")
    rows = [by_number.get(number, {}) for number in range(group_count)]
    return [_mapping(row, where, "a group's state") for row in rows], groups


def _moments(
    states: Sequence[Mapping[Any, Any]], flat: Sequence[StoredTensor], where: str
) -> dict[str, tuple[StoredTensor, ...]]:
    """Vectors beside the weights' that every group has."""
    kinds = [key for key in (states[0] if states else {}) if isinstance(key, str) and key != _STEP]
    found: dict[str, tuple[StoredTensor, ...]] = {}
    for kind in kinds:
        row = tuple(state.get(kind) for state in states)
        tensors = tuple(tensor for tensor in row if isinstance(tensor, StoredTensor))
        if len(tensors) < len(flat) or not all(tensor.shape for tensor in tensors):
            continue
        for tensor, weights in zip(tensors, flat, strict=True):
            # the weights are stored without what pads the last rank's part, moments with it
            if tensor.element_count < weights.element_count or not tensor.contiguous:
                raise FormatError(f"{where}: {printable(kind)} is shorter than the weights it belongs to")
        found[kind] = tensors
    return found


def _alignments(value: Any, where: str) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    rows = value if isinstance(value, list) else [None]
    if not all(isinstance(row, list) and all(count_of(n) is not None for n in row) for row in rows):
        raise FormatError(f"{where}: param_alignment_paddings holds something else than counts")
    return tuple(map(tuple, rows))
