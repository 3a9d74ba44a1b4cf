"""Plans a universal checkpoint: which tensor goes into which file, and what else DeepSpeed reads when it
resumes.

Moments that are not given are one zero, repeated: DeepSpeed then begins them anew, with the count of steps
at zero. Training state (counts, schedule, parameter groups, what the user saved) is the newest source's.
`latest_universal` names the folder itself, so that `load_checkpoint(OUTPUT)` finds it wherever it lies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pma.errors import FormatError, UsageError, printable
from pma.formats.contracts import CheckpointReader, ReadRequest
from pma.formats.deepspeed_states import MASTERS, TrainingState
from pma.formats.files import is_inside
from pma.formats.torch_archive import Size, StoredTensor
from pma.formats.torch_contents import kept, tensors_in
from pma.formats.torch_pickle import CannotEncode, TensorPlace
from pma.formats.torch_writing import archive_layout
from pma.formats.unpickling import OrderedMapping
from pma.types import DType, Layout, OutputFile, Role, TensorSpec

PARAMETERS = "zero"
OPTIMIZER_FILE = f"{PARAMETERS}/optimizer_state.pt"
#: of stages 1 and 2, of stage 3: each looks for its own
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
UNIVERSAL_LATEST = "latest_universal"
STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PREFIX = "optimizer."
# the version of deepspeed whose reading this was tested with, for outputs without a source of DeepSpeed's
_TESTED_VERSION = "0.19.8"
_INFO, _INFO_VERSION = "universal_checkpoint_info", {"universal_checkpoint_version": 0.2}
_LARGEST_EMBEDDED_BYTES = 2**20
_LONGEST_NAME_BYTES = 255
_EMBEDDED = "\0"  # begins the names of tensors of training state, which are read when planned


def moment_name(kind: str, parameter: str) -> str:
    """The name of what the optimizer keeps of a parameter."""
    return f"{_PREFIX}{kind}.{parameter}"


def kind_of(spec: TensorSpec) -> str:
    """What a tensor is of its parameter: `fp32`, or by its name `exp_avg` and so on. Raises UsageError."""
    if spec.parameter is None or spec.role in (Role.PARAMETER, Role.MASTER):
        return MASTERS
    if spec.name.startswith(_PREFIX) and spec.name.endswith(f".{spec.parameter}"):
        return spec.name[len(_PREFIX) : -len(spec.parameter) - 1]
    found = [part for part in re.split(r"[./]", spec.name) if part in (*_MOMENTS, STEP)]
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{printable(spec.name)} has no place in a universal checkpoint; leave it out with --exclude"
    )


def universal_layout(tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
    """Where an output's tensors go. `like`: a reader of DeepSpeed's, whose training state is carried."""
    told: Callable[[], TrainingState] | None = getattr(like, "training_state", None)
    state = told() if told is not None else _nothing_known(tensors)
    planner = _Planner(tensors, state, like)
    files = [file for name in planner.trained for file in planner.parameter_files(name)]
    if not files:
        raise UsageError("no trained parameter is left to write")
    files += [planner.optimizer_file(), *planner.model_files()]
    return Layout(tensors=dict(tensors), files=tuple(files), records={UNIVERSAL_LATEST: b"."})


def _nothing_known(tensors: Mapping[str, TensorSpec]) -> TrainingState:
    """For sources of other formats: every parameter is trained, nothing has been counted."""
    trained = {
        name: spec
        for name, spec in tensors.items()
        if spec.role is Role.PARAMETER and spec.dtype.kind == "float"
    }
    shapes = OrderedMapping()
    shapes.update({name: Size(spec.shape) for name, spec in trained.items()})
    counts = ("skipped_steps", "global_steps", "global_samples")
    model: dict[str, Any] = {
        "param_shapes": [shapes],
        "shared_params": {},
        "frozen_param_shapes": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        **dict.fromkeys(counts, 0),
        "dp_world_size": 1,
        "ds_config": {},
        "ds_version": _TESTED_VERSION,
    }
    zero = TensorSpec(name=STEP, dtype=DType.F32, shape=())
    return TrainingState(
        trained=trained.keys(),
        model=model,
        optimizer={},
        groups=[{}],
        steps=dict.fromkeys(trained, zero),
    )


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A value to be written, and the bytes of those of its tensors that are known."""

    value: Any
    data: Mapping[str, bytes]


class _Planner:
    """Plans the files of one output."""

    def __init__(
        self, tensors: Mapping[str, TensorSpec], state: TrainingState, like: CheckpointReader | None
    ) -> None:
        self._state = state
        self._like = like
        self._planned: dict[tuple[Any, ...], OutputFile] = {}
        self._of: dict[str, dict[str, TensorSpec]] = {}
        self._whole: dict[str, TensorSpec] = {}
        for spec in tensors.values():
            parameter = spec.parameter or spec.name
            if spec.role in (Role.MASTER, Role.MOMENT, Role.OTHER) or parameter in state.trained:
                self._of.setdefault(parameter, {})[kind_of(spec)] = spec
            elif spec.role in (Role.PARAMETER, Role.BUFFER):
                self._whole[spec.name] = spec
            else:
                raise UsageError(f"{printable(spec.name)} has no place in a universal checkpoint")
        # without moments the optimizer begins anew
        self._resumes = any(spec.role is Role.MOMENT for spec in tensors.values())

    @property
    def trained(self) -> Iterator[str]:
        """Parameters with files of their own, in order."""
        yield from (name for name, kinds in self._of.items() if MASTERS in kinds)

    def parameter_files(self, name: str) -> Iterator[OutputFile]:
        """The files of one parameter."""
        _check_name(name)
        kinds = self._of[name]
        beside = kept(dict(self._state.beside.get(name, {})), "", {}) or {}
        fp32 = kinds[MASTERS]
        yield self._tensor_file(name, MASTERS, fp32, beside)
        for kind in dict.fromkeys((*_MOMENTS, *kinds)):
            if kind not in (MASTERS, STEP):
                yield self._tensor_file(name, kind, kinds.get(kind, fp32.shape), beside)
        if STEP in kinds:
            spec = kinds[STEP]
            key: tuple[Any, ...] = (STEP, spec.dtype, spec.shape)
            yield self._alike(self._file(name, STEP), spec.name, key, lambda: _Known(value=spec, data={}))
        elif self._state.steps.get(name) is not None:
            # one object stands for the count of all parameters of a group
            key = (STEP, id(self._state.steps[name]))
            yield self._alike(self._file(name, STEP), "", key, lambda: self._step(name))

    def _tensor_file(
        self, name: str, kind: str, given: TensorSpec | tuple[int, ...], beside: Mapping[str, Any]
    ) -> OutputFile:
        """One tensor of a parameter: `given`, or zeros of a shape."""
        key: tuple[Any, ...]
        if isinstance(given, TensorSpec):
            known, key, tensor = _Known(value=given, data={}), (given.dtype, given.shape), given.name
        else:
            known, key, tensor = _zeros(given), ("zeros", given), ""
        entries = _Known(value={"cat_dim": 0, **beside, "param": known.value}, data=known.data)
        if beside and beside != {"cat_dim": 0}:
            return _planned(self._file(name, kind), entries.value, entries.data)
        return self._alike(self._file(name, kind), tensor, key, lambda: entries)

    def _alike(self, file: str, tensor: str, key: tuple[Any, ...], known: Callable[[], _Known]) -> OutputFile:
        """A file that differs from others of the same key only in whose values it holds: their names are not
        in it.
        """
        if key not in self._planned:
            made = known()
            self._planned[key] = _planned(file, made.value, made.data)
        planned = self._planned[key]
        fragments = tuple(replace(part, tensor=tensor, file=file) for part in planned.fragments)
        return replace(planned, name=file, fragments=fragments)

    def optimizer_file(self) -> OutputFile:
        """What all parameters share: settings of the groups, where stages 1 and 2 look for them and where
        stage 3 does.
        """
        known = self._entries(self._state.optimizer)
        groups = self._entries({"groups": list(self._state.groups)}).value.get("groups", [])
        if not self._resumes:
            groups = [{**group, STEP: 0} if STEP in group else group for group in groups]
        step = self._step(next(self.trained))
        inner = {"state": {0: {STEP: step.value}}, "param_groups": groups or [{}]}
        # stage 3 does not write the version here, stages 1 and 2 do not read a file without
        version = {"ds_version": self._state.model.get("ds_version") or _TESTED_VERSION}
        value = {**version, **known.value, "param_groups": groups, "optimizer_state_dict": inner}
        return _planned(OPTIMIZER_FILE, value, {**known.data, **step.data})

    def model_files(self) -> Iterator[OutputFile]:
        """What is stored whole, counts and schedule, for stages 1 and 2 and for stage 3."""
        dropped = ("module", "buffer_names", "optimizer", "frozen_param_fragments")
        entries = {key: entry for key, entry in self._state.model.items() if key not in dropped}
        known = self._entries(entries)
        module = OrderedMapping()
        module.update(self._whole)
        value = {
            "module": module,
            "buffer_names": [n for n, spec in self._whole.items() if spec.role is Role.BUFFER],
            "optimizer": None,
            "frozen_param_fragments": None,
            _INFO: _INFO_VERSION,
            **known.value,
            "frozen_param_shapes": None,
            "mp_world_size": 1,
        }
        yield _planned(MODEL_FILES[0], value, known.data)
        yield _planned(MODEL_FILES[1], {**value, "module": OrderedMapping()}, known.data)

    def _file(self, name: str, kind: str) -> str:
        return f"{PARAMETERS}/{name}/{kind}.pt"

    def _step(self, name: str) -> _Known:
        """A parameter's count of steps: the newest's with its moments, else zero, in the same type."""
        step = self._state.steps.get(name)
        if isinstance(step, TensorSpec):  # nothing was counted
            return _Known(value=step, data={STEP: bytes(step.length_bytes)})
        if isinstance(step, StoredTensor):
            made = self._entries({STEP: step})
            data = made.data if self._resumes else {key: bytes(len(was)) for key, was in made.data.items()}
            return _Known(value=made.value.get(STEP, 0), data=data)
        if not isinstance(step, (int, float)):  # an optimizer that counts in its groups
            group = self._state.groups[0] if self._state.groups else None
            step = group.get(STEP, 0) if isinstance(group, dict) else 0
        return _Known(value=step if self._resumes else 0, data={})

    def _entries(self, entries: Mapping[str, Any]) -> _Known:
        """Entries as they are, small tensors among them read; what cannot be written again is left out."""
        made: dict[str, Any] = {}
        data: dict[str, bytes] = {}
        for key, entry in entries.items():
            path = f"{_EMBEDDED}{key}"
            small = {p: t for p, t in tensors_in(entry, path, OPTIMIZER_FILE, 0) if _is_small(t)}
            specs = {p: TensorSpec(name=p, dtype=t.dtype, shape=t.shape) for p, t in small.items()}
            copy = kept(entry, path, specs)
            if copy is not None or entry is None:
                made[key] = copy
                data |= {p: self._read(t) for p, t in small.items()}
        return _Known(value=made, data=data)

    def _read(self, tensor: StoredTensor) -> bytes:
        assert self._like is not None  # tensors are in what a reader told
        into = bytearray(tensor.element_count * tensor.dtype.bits // 8)
        request = ReadRequest(file=tensor.file, offset_bytes=tensor.offset_bytes, into=memoryview(into))
        self._like.read_many([request])
        return bytes(into)


def _is_small(tensor: StoredTensor) -> bool:
    return tensor.contiguous and tensor.element_count * tensor.dtype.bits // 8 <= _LARGEST_EMBEDDED_BYTES


def _zeros(shape: Sequence[int]) -> _Known:
    one = TensorSpec(name=f"{_EMBEDDED}zero", dtype=DType.F32, shape=())
    return _Known(value=TensorPlace(spec=one, repeated_to=tuple(shape)), data={one.name: bytes(4)})


def _planned(file: str, value: Any, data: Mapping[str, bytes] | None = None) -> OutputFile:
    """The archive of a value, with the bytes of tensors that are known."""
    try:
        planned = archive_layout(file, value)
    except CannotEncode as error:
        raise FormatError(f"{file} cannot be written as DeepSpeed reads it: {error}") from error
    if not data:
        return planned
    known = [(f.offset_bytes, data[f.tensor]) for f in planned.fragments if f.tensor in data]
    return replace(
        planned,
        constants=tuple(sorted([*planned.constants, *known])),
        fragments=tuple(f for f in planned.fragments if f.tensor not in data),
    )


def _check_name(name: str) -> None:
    """A parameter's name becomes a folder's."""
    plain = "/" not in name and is_inside(name) and len(name.encode()) <= _LONGEST_NAME_BYTES
    if not plain or f"{PARAMETERS}/{name}" == OPTIMIZER_FILE:
        raise FormatError(
            f"{printable(name)!r} cannot be the name of a folder, as a universal checkpoint needs; leave it "
            "out with --exclude"
        )
