"""What of a model is averaged: parameters and persistent buffers, live, under the names of its state dict.

The engine's rule for merges holds here too: values of floating (and complex) types are averaged, any other
is the newest checkpoint's and is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pma.errors import InputError, UsageError, printable
from pma.formats.torch_archive import TORCH_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import nn

#: gives the fp32 master of a parameter, or None where there is none
Masters = Callable[[str, "torch.Tensor"], "torch.Tensor | None"]

# what wrappers put into names, and checkpoints leave out
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_KEPT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the model that is averaged, and where it is found at each step.

    `others`: further names of the same tensor (tied weights).
    """

    name: str
    others: tuple[str, ...]
    module: nn.Module
    attribute: str
    parameter: torch.Tensor | None

    @property
    def live(self) -> torch.Tensor:
        """The tensor that training changes. A buffer may be another one at each step."""
        if self.parameter is not None:
            return self.parameter
        buffer: torch.Tensor | None = self.module._buffers[self.attribute]
        if buffer is None:
            raise UsageError(f"buffer {printable(self.name)} was removed after the recorder was made")
        return buffer

    @property
    def local(self) -> torch.Tensor:
        """The part of it that this process holds; all of it unless it is a DTensor."""
        return local_part(self.live)

    def check(self) -> None:
        """Raises UsageError where the model has another parameter by now, which would never be recorded."""
        if self.parameter is None or is_sharded(self.parameter):
            return  # FSDP puts whole parameters in place of its shards while it computes
        if self.module._parameters.get(self.attribute) is not self.parameter:
            raise UsageError(
                f"parameter {printable(self.name)} was replaced after the recorder was made; make the "
                "recorder when the model is final (on its device, wrapped, loaded)"
            )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor, without communication; any other tensor itself. Shares the memory."""
    found: Any = tensor.detach()
    part: torch.Tensor = found.to_local() if is_sharded(found) else found
    return part


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def entries_of(model: nn.Module) -> tuple[Entry, ...]:
    """The model's tensors that are averaged, in the order of its state dict, each once.

    Raises InputError for quantised ones, and for a model without any.
    """
    reshard(model)
    found: dict[int, tuple[str, list[str], nn.Module, str, torch.Tensor | None]] = {}
    for name, module, attribute, tensor, is_parameter in _stored(model):
        if not _averaged(name, tensor):
            continue
        seen = found.get(id(tensor))
        if seen is None:
            found[id(tensor)] = (name, [], module, attribute, tensor if is_parameter else None)
        else:
            seen[1].append(name)
    if not found:
        raise InputError("the model has no floating-point parameter or buffer; there is nothing to average")
    return tuple(
        Entry(name=name, others=tuple(others), module=module, attribute=attribute, parameter=parameter)
        for name, others, module, attribute, parameter in found.values()
    )


def masters_of(optimizer: Any) -> Masters:
    """Finds the fp32 copy that the optimizer keeps of a parameter: an entry of its state whose name has
    "master" in it (`master_param` of Transformer Engine's FusedAdam) and whose shape is the parameter's.
    """

    def find(_: str, parameter: torch.Tensor) -> torch.Tensor | None:
        state = optimizer.state.get(parameter)
        for key, value in (state or {}).items():
            if "master" in str(key) and getattr(value, "shape", None) == parameter.shape:
                return value  # type: ignore[no-any-return]
        return None

    return find


def given_masters(masters: Mapping[str, torch.Tensor]) -> Masters:
    """The masters in a mapping from parameter names."""
    return lambda name, _: masters.get(name)


def value_of(entry: Entry, masters: Masters | None) -> tuple[torch.Tensor, str]:
    """The entry's value (this process's part), and which of `formats.interval_mean.AVERAGED` it is.

    Raises InputError for a master that is no fp32 copy of its parameter.
    """
    import torch

    local = entry.local
    rounded = _bits(local) < _KEPT_BITS
    if masters is None or entry.parameter is None or not rounded:
        return local, "rounded weights" if rounded and entry.parameter is not None else "weights"
    master = masters(entry.name, entry.parameter)
    if master is None:
        return local, "rounded weights"
    master = local_part(master)
    if master.shape != local.shape or master.dtype != torch.float32:
        raise InputError(
            f"master of {printable(entry.name)}: {master.dtype} {tuple(master.shape)}, expected "
            f"torch.float32 {tuple(local.shape)} as its parameter (a shard, where the parameter is one)"
        )
    return master, "masters"


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered, so that the next pass gathers the shards as they are then."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def _stored(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor, bool]]:
    """What the state dict holds, tied tensors under each name: name, module, attribute, tensor, whether a
    parameter.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for wrapper in _WRAPPERS:
            prefix = f"{prefix}.".replace(wrapper, "")[:-1]
        before = f"{prefix}." if prefix else ""
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield before + attribute, module, attribute, parameter, True
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                yield before + attribute, module, attribute, buffer, False


def _averaged(name: str, tensor: torch.Tensor) -> bool:
    dtype = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or dtype.kind == "quantised":
        raise InputError(
            f"{printable(name)} is {tensor.dtype}, whose values mean nothing without their scales; "
            "record the weights that they are made from"
        )
    return dtype.averaged


def _bits(tensor: torch.Tensor) -> int:
    return tensor.element_size() * 8
