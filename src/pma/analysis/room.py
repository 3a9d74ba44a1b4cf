"""How much memory a look around a merge takes, and how much there is: said before anything is read."""

# P parameters, K checkpoints of the window

from __future__ import annotations

from dataclasses import dataclass, replace

from pma import engine
from pma.engine import MergeOptions, Plan
from pma.errors import InputError
from pma.quantities import bytes_text

# a merge in memory, the model made of it, and what the one before has not let go of yet
_COPIES = 3
# of logits and of what comes before them: values, gradients, and gradients of these
_ACTIVATIONS = 8
_FP32, _FP64 = 4, 8
_MEMINFO = "/proc/meminfo"


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes needed: `models_bytes` to evaluate models one by one; for derivatives and planes besides,
    `vectors_bytes` of the machine's memory and `device_bytes` of that of the device that computes.
    """

    models_bytes: int
    vectors_bytes: int
    device_bytes: int


def room_for(plan: Plan, *, batch_tokens: int) -> Room:
    """What a look at this merge and its checkpoints takes. `batch_tokens`: tokens of one batch."""
    parameters, checkpoints = engine.parameter_count(plan.tensors), len(plan.sources)
    words = max((s.shape[0] for s in plan.tensors.values() if len(s.shape) == 2), default=0)
    # points and deviations, each in fp64, and as many products of the Hessian
    vectors = 2 * (checkpoints + 1) * _FP64 * parameters
    directions = checkpoints * (2 * _FP32 + 2 * _FP64) * parameters
    activations = _ACTIVATIONS * batch_tokens * words * _FP32
    return Room(
        # results of several merges are there at once, as far as they fit into the merges' memory
        models_bytes=_COPIES * plan.bytes_to_write + plan.options.memory_bytes,
        vectors_bytes=vectors,
        device_bytes=directions + 6 * _FP32 * parameters + activations,
    )


def with_room_for_many(options: MergeOptions) -> MergeOptions:
    """So much memory that several models are made from one read of the checkpoints: a quarter of what there
    is, or as much as was given.
    """
    return replace(options, memory_bytes=max(options.memory_bytes, available_bytes() // 4))


def check_models(room: Room) -> None:
    """Raises InputError where not even single models fit."""
    there = available_bytes()
    if room.models_bytes > there:
        raise InputError(
            f"evaluating merges of this model in memory takes about {bytes_text(room.models_bytes)}, and "
            f"{bytes_text(there)} are available; use a machine with more memory"
        )


def lacking(room: Room) -> str | None:
    """What is lacking for derivatives and planes, in words; None where all fits."""
    there, on_device = available_bytes(), device_bytes()
    host = room.models_bytes + room.vectors_bytes + (room.device_bytes if on_device is None else 0)
    if host > there:
        return f"takes about {bytes_text(host)} of memory, and {bytes_text(there)} are available"
    if on_device is not None and room.device_bytes > on_device:
        return (
            f"takes about {bytes_text(room.device_bytes)} of the GPU's memory, and {bytes_text(on_device)} "
            "are available"
        )
    return None


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    import os

    try:
        with open(_MEMINFO, encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int | None:
    """Free memory of the GPU that evaluations run on; None where they run on the CPU."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
