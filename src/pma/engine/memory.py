"""A merge that is not written: the same plan and stream, into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pma.engine.plan import Plan
from pma.engine.stream import Output, Progress, stream
from pma.engine.work import Work, work_of
from pma.types import DType, Fragment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TORCH_NAMES = {"I": "int", "U": "uint", "F": "float", "C": "complex"}


class MemoryPart:
    """A `PartWriter` whose files are buffers."""

    def __init__(self, plan: Plan) -> None:
        self.files = {file.name: bytearray(file.size_bytes) for file in plan.layout.files}

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        self.files[file][offset_bytes : offset_bytes + len(values)] = values

    def sync(self) -> None:
        """Nothing to make durable."""

    def close(self) -> None:
        """Nothing to let go."""


def average(plan: Plan) -> dict[str, Tensor]:
    """The plan's result as tensors by name, equal to the bit to what `write` puts into files.

    It takes as much memory as the output has bytes.
    """
    return average_all(work_of(plan), [plan])[0]


def average_all(
    work: Work, plans: Sequence[Plan], progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """As `average`, for several merges that share their reads: `work` has a recipe for each of `plans`."""
    parts = [MemoryPart(plan) for plan in plans]
    stream(work, [Output(part=part) for part in parts], progress=progress)
    return [_tensors(plan, part) for plan, part in zip(plans, parts, strict=True)]


def _tensors(plan: Plan, part: MemoryPart) -> dict[str, Tensor]:
    import torch

    tensors: dict[str, Tensor] = {}
    for file in plan.layout.files:
        for fragment in file.fragments:
            spec = plan.layout.tensors[fragment.tensor]
            if fragment.length_bytes == spec.length_bytes > 0:
                flat = torch.frombuffer(
                    part.files[file.name],
                    dtype=torch_dtype(spec.dtype),
                    count=spec.element_count,
                    offset=fragment.offset_bytes,
                )
                tensors[spec.name] = flat.reshape(spec.shape)
                continue
            if spec.name not in tensors:
                tensors[spec.name] = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            _put(tensors[spec.name], fragment, part.files[file.name])
    return {name: tensors[name] for name in plan.layout.tensors if name in tensors}


def _put(whole: Tensor, fragment: Fragment, file: bytearray) -> None:
    """Copy a shard of a tensor to its place in it."""
    import torch

    count = fragment.length_bytes // whole.element_size()
    if count == 0:
        return
    values = torch.frombuffer(file, dtype=whole.dtype, count=count, offset=fragment.offset_bytes)
    if fragment.box is None:
        first = fragment.flat_start or 0
        whole.view(-1)[first : first + count] = values
        return
    starts, sizes = fragment.box
    place = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    whole[place] = values.reshape(sizes)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type of `dtype`, which is not a quantised one."""
    import torch

    if dtype is DType.BOOL:
        return torch.bool
    name = "bfloat16" if dtype is DType.BF16 else f"{_TORCH_NAMES[dtype.name[0]]}{dtype.bits}"
    found: torch.dtype = getattr(torch, name)
    return found
