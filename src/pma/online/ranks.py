"""Which processes record what: one alone, rank 0 for all (replicas), or each its own shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pma.errors import UsageError
from pma.online.entries import Entry, is_sharded

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """`sharded`: each process records its part of DTensors. `replicated`: rank 0 records for all."""

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def replicated(self) -> bool:
        return self.count > 1 and not self.sharded

    @property
    def records(self) -> bool:
        """Whether this process keeps averages."""
        return self.sharded or self.rank == 0


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile; any other itself."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    inner: Any = model
    while True:
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            found: nn.Module = inner
            return found


def ranks_of(model: nn.Module, entries: Sequence[Entry]) -> Ranks:
    """How the model lies over the processes. Where there are several, all of them call this.

    Raises UsageError where ranks hold different weights that are no DTensors: recording those of rank 0 would
    lose the others'.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks(sharded=any(is_sharded(entry.live) for entry in entries))
    rank, count = dist.get_rank(), dist.get_world_size()
    if any(is_sharded(entry.live) for entry in entries):
        return Ranks(rank=rank, count=count, sharded=True)
    group = _replicas(model)
    if group is not None and group.size() != count:
        raise UsageError(
            f"the model is replicated over {group.size()} of {count} processes: the others train something "
            "else (stages of a pipeline?), whose weights rank 0 cannot record"
        )
    if group is None:
        digests: list[Any] = [None] * count
        dist.all_gather_object(digests, _digest(entries))
        if len(set(digests)) > 1:
            raise UsageError(
                f"the model's weights differ among the {count} processes and are no DTensors. Make the "
                "recorder after DistributedDataParallel has made them the same; sharded weights are recorded "
                "under FSDP2 (fully_shard), not under FSDP1 or other sharding by hand"
            )
    return Ranks(rank=rank, count=count)


def as_dtensor(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`local` as this process's part of a DTensor cut as `like` is; itself where `like` is none.

    It stays on its own device, whichever the mesh is of: averages may lie on the CPU.
    """
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = like._spec  # type: ignore[attr-defined]
    meta = TensorMeta(shape=like.shape, stride=spec.tensor_meta.stride, dtype=local.dtype)
    # not DTensor.from_local, which moves what it is given to the mesh's device
    made: torch.Tensor = DTensor(
        local, DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta), requires_grad=False
    )
    return made


def _replicas(model: nn.Module) -> Any:
    """The process group of DistributedDataParallel; None for any other model."""
    from torch.nn.parallel import DistributedDataParallel

    outer = getattr(model, "_orig_mod", model)
    return outer.process_group if isinstance(outer, DistributedDataParallel) else None


def _digest(entries: Sequence[Entry]) -> str:
    """Of names, shapes and sums; equal weights have equal sums, and other weights hardly ever."""
    import torch

    seen = hashlib.sha256()
    for entry in entries:
        wide = torch.complex128 if entry.local.is_complex() else torch.float64
        total = entry.local.sum(dtype=wide).item()
        seen.update(f"{entry.name} {tuple(entry.local.shape)} {total!r}\n".encode())
    return seen.hexdigest()
