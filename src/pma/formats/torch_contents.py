"""What trainers put into the files of `torch.save`: which entry holds the weights, what the rest says of the
run, and what of the rest belongs beside merged weights.

Source: lightning 2.6 (`checkpoint_connector.py`, `weight_averaging.py`), litgpt and nanochat as of 2026.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pma.errors import FormatError, printable
from pma.formats.optimizer_kinds import FIRST_MOMENTS, MASTERS, SECOND_MOMENTS, STEP
from pma.formats.torch_archive import StoredTensor
from pma.formats.torch_pickle import CannotEncode, TensorPlace, encode
from pma.formats.unpickling import OrderedMapping
from pma.types import CheckpointMeta, Role, TensorSpec

#: classes that checkpoints of these trainers hold, read as inert records
RECORDS = (
    "argparse.Namespace",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)

_LIVE, _STATE = "current_model_state", "state_dict"
_WRAPPERS = ("model", _STATE, "model_state_dict", "module", "model_state")
_STEPS = ("global_step", "step_count", "step", "iteration")
# what continues training and means nothing beside other weights; Lightning too leaves its part of them out of
# checkpoints that are weights only
#: entries that continue training
TRAINING = frozenset(
    {
        "averaging_state",
        "callbacks",
        _LIVE,
        "dataloader",
        "lr_scheduler",
        "lr_scheduler_state_dict",
        "lr_schedulers",
        "optimizer",
        "optimizer_state_dict",
        "optimizer_states",
        "rng_state",
        "scaler",
        "scheduler",
        "scheduler_state_dict",
        "train_dataloader",
    }
)
_MOMENTS = FIRST_MOMENTS | SECOND_MOMENTS
_DEEPEST = 100
_LARGEST_COUNT = 2**63


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file's value and the entry of it that holds the weights; None where the value is the weights."""

    value: Mapping[Any, Any]
    weights_at: str | None

    @property
    def weights(self) -> Mapping[Any, Any]:
        found: Mapping[Any, Any] = self.value if self.weights_at is None else self.value[self.weights_at]
        return found

    @property
    def rest(self) -> dict[Any, Any]:
        """Every other entry."""
        if self.weights_at is None:
            return {}
        return {key: entry for key, entry in self.value.items() if key != self.weights_at}


def contents(value: Any, where: str) -> Contents:
    """Where the weights are in what `torch.save` was given. Raises FormatError where that is not clear.

    In a Lightning checkpoint with an averaging callback, `state_dict` is the callback's average; the live
    weights, which are what a merge averages, are in `current_model_state`.
    """
    if not isinstance(value, dict):
        raise FormatError(
            f"{where} holds a {printable(type(value).__name__)}, expected a state dict: names and tensors"
        )
    for key in (_LIVE, *_WRAPPERS):
        if isinstance(value.get(key), dict) and _holds_tensor(value[key]):
            return Contents(value=value, weights_at=key)
    if _holds_tensor(value):
        return Contents(value=value, weights_at=None)
    keys = ", ".join(printable(str(key), 40) for key in list(value)[:8]) or "nothing"
    raise FormatError(
        f"{where} holds {keys}; expected tensors by name, or an entry of them named {', '.join(_WRAPPERS)}"
    )


def _holds_tensor(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, StoredTensor) for value in mapping.values())


def weights_in(found: Contents, where: str) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor of the weights by name, in order."""
    for name, tensor in found.weights.items():
        if isinstance(tensor, StoredTensor):
            if not isinstance(name, str):
                raise FormatError(f"{where}: a tensor is named by a {type(name).__name__}, expected text")
            yield name, tensor
        elif any(True for _ in tensors_in(tensor, "", where, 0)):
            raise FormatError(
                f"{where}: {printable(str(name))} is no tensor but holds some; expected one level of names"
            )


def others_in(found: Contents, where: str) -> Iterator[tuple[str, StoredTensor]]:
    """Every other tensor, named by its way from the top, such as `optimizer_states/0/state/1/exp_avg`."""
    for key, entry in found.rest.items():
        yield from tensors_in(entry, str(key), where, 0)


def spec_of(name: str, tensor: StoredTensor) -> TensorSpec:
    """A tensor that is not a weight: what an optimizer keeps for a parameter is in its `state`, by the
    parameter.
    """
    *_, inside, _, kind = ("", "", *name.split("/"))
    kept = kind if inside == "state" else None
    role = Role.MASTER if kept in MASTERS else Role.MOMENT if kept in _MOMENTS else Role.OTHER
    return TensorSpec(name=name, dtype=tensor.dtype, shape=tensor.shape, role=role, kind=kept)


def tensors_in(
    value: Any, path: str, where: str, depth: int, seen: set[int] | None = None
) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors in a value; what it holds several times is looked into once."""
    seen = set() if seen is None else seen
    if isinstance(value, StoredTensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        if depth > _DEEPEST:
            raise FormatError(f"{where}: values are nested too deeply")
        seen.add(id(value))
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(entry, f"{path}/{key}", where, depth + 1, seen)


def counts_of_steps(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[dict[Any, Any], str]]:
    """What an optimizer keeps for a parameter (entries of `state`) with a count of steps that is a plain
    number, and where that is.
    """
    if not isinstance(value, (dict, list, tuple)) or depth > _DEEPEST:
        return
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if key == "state" and isinstance(entry, dict):
            for parameter, kept_for in entry.items():
                if isinstance(kept_for, dict) and type(kept_for.get(STEP)) in (int, float):
                    yield kept_for, f"{path}/state/{parameter}/{STEP}"
        else:
            yield from counts_of_steps(entry, f"{path}/{key}", depth + 1)


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A value to be written, and the entries of the original that it lacks."""

    value: Any
    left_out: tuple[str, ...]


def rebuilt(found: Contents, tensors: Mapping[str, TensorSpec]) -> Rebuilt:
    """The value to be written: as in `found`, with the tensors named.

    Without tensors of training (optimizer and so on) entries of training are left out, as are entries that
    hold a tensor which is not named, or what cannot be written as it was.
    """
    weights = _weights(found.weights, tensors)
    if found.weights_at is None:
        return Rebuilt(value=weights, left_out=())
    training = any(spec.role in (Role.MASTER, Role.MOMENT, Role.OTHER) for spec in tensors.values())
    made: dict[Any, Any] = {}
    missing: list[str] = []
    for key, entry in found.rest.items():
        copy = None if not training and key in TRAINING else kept(entry, str(key), tensors)
        if copy is None and entry is not None:
            missing.append(str(key))
        else:
            made[key] = copy
    made[_STATE if found.weights_at == _LIVE and not training else found.weights_at] = weights
    return Rebuilt(value=made, left_out=tuple(missing))


def _weights(weights: Mapping[Any, Any], tensors: Mapping[str, TensorSpec]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    if isinstance(weights, OrderedMapping):
        made = OrderedMapping()
        made.attributes = weights.attributes if _is_plain(weights.attributes) else None
    for name, value in weights.items():
        if not isinstance(value, StoredTensor):
            if _is_plain(value):
                made[name] = value
        elif name in tensors:
            made[name] = _place(value, tensors[name])
    return made


def _place(tensor: StoredTensor, spec: TensorSpec) -> TensorPlace:
    return TensorPlace(spec=spec, requires_grad=tensor.requires_grad, parameter=tensor.parameter)


def _is_plain(value: Any) -> bool:
    try:
        encode(value)
    except CannotEncode:
        return False
    return True


def kept(value: Any, path: str, tensors: Mapping[str, TensorSpec]) -> Any:
    """An entry with its tensors placed; None where it is to be left out."""
    try:
        copy = _placed(value, path, tensors, {}, 0)
        encode(copy)
    except CannotEncode:
        return None
    return copy


def _placed(
    value: Any, path: str, tensors: Mapping[str, TensorSpec], made: dict[int, Any], depth: int
) -> Any:
    """A copy with places for tensors; `made` has the copies of what occurs several times, by identity."""
    if isinstance(value, StoredTensor):
        if path not in tensors:
            raise CannotEncode("a tensor of it is not to be written")
        return _place(value, tensors[path])
    if type(value) not in (dict, OrderedMapping, list, tuple):
        return value
    if depth > _DEEPEST:
        raise CannotEncode("values are nested too deeply")
    if id(value) not in made:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        copies = {key: _placed(entry, f"{path}/{key}", tensors, made, depth + 1) for key, entry in pairs}
        made[id(value)] = _like(value, copies)
    return made[id(value)]


def _like(value: Any, copies: dict[Any, Any]) -> Any:
    if isinstance(value, OrderedMapping):
        copy = OrderedMapping()
        copy.update(copies)
        copy.attributes = value.attributes
        return copy
    return copies if isinstance(value, dict) else type(value)(copies.values())


def meta_of(found: Contents) -> CheckpointMeta:
    """What the entries beside the weights say of step and learning rate."""
    rest = found.rest
    step = next((_count(rest[key]) for key in _STEPS if _count(rest.get(key)) is not None), None)
    return CheckpointMeta(step=step, learning_rate=_learning_rate(rest))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST_COUNT else None


def _learning_rate(rest: Mapping[Any, Any]) -> float | None:
    """The rate of the first parameter group, by the optimizer's own state."""
    states = rest.get("optimizer_states")
    first = states[0] if isinstance(states, list) and states else rest.get("optimizer")
    groups = first.get("param_groups") if isinstance(first, dict) else None
    group = groups[0] if isinstance(groups, list) and groups else None
    rate = group.get("lr") if isinstance(group, dict) else None
    return rate if isinstance(rate, float) and math.isfinite(rate) else None
