"""Files as DeepSpeed's ZeRO writes them, made with torch.save; DeepSpeed's classes are stand-ins of the same
names.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from math import ceil, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class ZeroStageEnum(int, Enum):
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


@dataclass
class fragment_address:  # noqa: N801  DeepSpeed's name
    numel: int
    start: int


_CLASSES = {
    "deepspeed.runtime.zero.config": ZeroStageEnum,
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
    "deepspeed.utils.tensor_fragment": fragment_address,
}


@contextmanager
def deepspeed_classes() -> Iterator[None]:
    """In the block, the stand-ins are pickled under DeepSpeed's names."""
    before = dict(sys.modules)
    try:
        for name, kind in _CLASSES.items():
            parts = name.split(".")
            for at in range(1, len(parts) + 1):
                sys.modules[".".join(parts[:at])] = ModuleType(".".join(parts[:at]))
            kind.__module__ = name
            setattr(sys.modules[name], kind.__name__, kind)
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.startswith("deepspeed")})


@dataclass(kw_only=True)
class Zero:
    """A checkpoint to be written. `groups`: trained parameters in fp32, group by group."""

    groups: Sequence[Mapping[str, torch.Tensor]]
    stage: int = 2
    ranks: int = 2
    step: int = 10
    rate: float = 0.5
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    alignment: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write every rank's files."""
        folder.mkdir(parents=True)
        with deepspeed_classes():
            for rank in range(self.ranks):
                saved = {
                    "optimizer_state_dict": self._optimizer(rank),
                    "ds_config": {},
                    "ds_version": "0.19.8",
                }
                torch.save(saved, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
                if self.stage == 3:
                    name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
                    torch.save(self._model(rank), folder / name)
            if self.stage < 3:
                torch.save(self._model(0), folder / "mp_rank_00_model_states.pt")
        return folder

    def _model(self, rank: int) -> dict[str, Any]:
        module: dict[str, torch.Tensor] = OrderedDict(self.buffers)
        for tensors in (*self.groups, self.frozen):
            for name, tensor in tensors.items():
                whole = tensor.to(torch.bfloat16) if tensor.dtype is torch.float32 else tensor
                module[name] = whole if self.stage < 3 else torch.empty(0, dtype=whole.dtype)
        kept = {"frozen_param_shapes": None, "frozen_param_fragments": None}
        if self.stage > 1:
            parts = {n: self._cut(t)[rank] if self.stage == 3 else t for n, t in self.frozen.items()}
            kept = {"frozen_param_shapes": OrderedDict((n, t.shape) for n, t in self.frozen.items())}
            kept["frozen_param_fragments"] = OrderedDict(parts)
        return {
            "module": module,
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "param_shapes": [OrderedDict((n, t.shape) for n, t in group.items()) for group in self.groups],
            **kept,
            "shared_params": dict(self.shared),
            "lr_scheduler": {"last_batch_iteration": self.step - 1, "base": torch.tensor([0.25])},
            "skipped_steps": 0,
            "global_steps": self.step,
            "global_samples": 4 * self.step,
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": self.stage}},
            "ds_version": "0.19.8",
            **self.model,
        }

    def _optimizer(self, rank: int) -> dict[str, Any]:
        weights = [self._flat(group, rank, padded=False) for group in self.groups]
        states = {}
        for number, group in enumerate(self.groups if self.moments else ()):
            rows = {kind: {name: of[name] for name in group} for kind, of in self.moments.items()}
            states[number] = {kind: self._flat(row, rank, padded=True) for kind, row in rows.items()}
            states[number]["step"] = torch.tensor(float(self.step))
        settings = [{"lr": self.rate, "betas": (0.9, 0.95), "params": [n]} for n in range(len(self.groups))]
        inner = {"state": states, "param_groups": settings}
        found: dict[str, Any] = {
            "loss_scaler": LossScaler(),
            "overflow": False,
            "zero_stage": ZeroStageEnum(self.stage),
            "partition_count": self.ranks if self.stage == 3 else [self.ranks] * len(self.groups),
        }
        if self.stage == 3:
            return {**found, "optimizer_state_dict": inner, "fp32_flat_groups": weights, **self.optimizer}
        addresses = [OrderedDict(any=fragment_address(numel=1, start=0)) for _ in self.groups]
        found |= {"base_optimizer_state": inner, "single_partition_of_fp32_groups": weights}
        if self.alignment > 1:
            found["param_alignment_paddings"] = [
                [-t.numel() % self.alignment for t in group.values()] for group in self.groups
            ]
        return {**found, "ds_version": "0.19.8", "param_slice_mappings": addresses, **self.optimizer}

    def _flat(self, tensors: Mapping[str, torch.Tensor], rank: int, *, padded: bool) -> torch.Tensor:
        """A rank's part of a group's vector."""
        if self.stage == 3:
            return torch.cat([self._cut(tensor)[rank] for tensor in tensors.values()])
        parts = [part for tensor in tensors.values() for part in (tensor.flatten(), self._gap(tensor))]
        used = sum(map(len, parts))
        whole = torch.cat([*parts, torch.full((-used % (2 * self.ranks),), 7e7)])
        size = len(whole) // self.ranks
        stop = (rank + 1) * size if padded or rank + 1 < self.ranks else max(used, rank * size)
        return whole[rank * size : stop].clone()

    def _gap(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full((-tensor.numel() % self.alignment,), 8e8)

    def _cut(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Equal parts for all ranks, the last padded."""
        part = ceil(prod(tensor.shape) / self.ranks)
        padding = torch.full((part * self.ranks - tensor.numel(),), 9e9, dtype=tensor.dtype)
        return (
            [chunk.clone() for chunk in torch.cat([tensor.flatten(), padding]).split(part)]
            if part
            else [tensor.flatten()] * self.ranks
        )
