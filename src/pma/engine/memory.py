"""A merge that is not written: the same plan and stream, into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pma.engine.plan import Plan
from pma.engine.stream import stream

if TYPE_CHECKING:
    from torch import Tensor


class MemoryPart:
    """A `PartWriter` whose files are buffers."""

    def __init__(self, plan: Plan) -> None:
        self.files = {file.name: bytearray(file.size_bytes) for file in plan.layout.files}

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        self.files[file][offset_bytes : offset_bytes + len(values)] = values

    def close(self) -> None:
        """Nothing to make durable."""


def average(plan: Plan) -> dict[str, Tensor]:
    """The plan's result as tensors by name, equal to the bit to what `write` puts into files.

    It takes as much memory as the output has bytes.
    """
    import torch

    from pma.averaging.accumulate import TORCH_DTYPES

    part = MemoryPart(plan)
    stream(plan, plan.blocks, part)
    tensors = {}
    for file in plan.layout.files:
        for fragment in file.fragments:
            spec = plan.layout.tensors[fragment.tensor]
            dtype = TORCH_DTYPES[spec.dtype]
            if spec.element_count == 0:
                tensors[spec.name] = torch.empty(spec.shape, dtype=dtype)
                continue
            flat = torch.frombuffer(
                part.files[file.name], dtype=dtype, count=spec.element_count, offset=fragment.offset_bytes
            )
            tensors[spec.name] = flat.reshape(spec.shape)
    return {name: tensors[name] for name in plan.layout.tensors}
