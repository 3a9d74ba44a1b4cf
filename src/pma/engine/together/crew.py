"""The processes that were started together, as torchrun and srun number them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pma.engine.lease import host
from pma.errors import UsageError, printable

# of a launch on a thousand nodes the last process may come minutes after the first
_JOIN_SECONDS = 600.0
# a process shows every few seconds that it lives; a file system may tell others up to a minute later
_SILENT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Crew:
    """A process's rank among `size` that make one output. Rank 0 leads.

    `join_seconds`: how long to wait for those that have not come; `silent_seconds`: after how long without a
    sign one counts as dead.
    """

    rank: int
    size: int
    node: str = field(default_factory=host)
    join_seconds: float = _JOIN_SECONDS
    silent_seconds: float = _SILENT_SECONDS

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UsageError(f"rank {self.rank} of {self.size} processes: ranks count from 0")

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """Who this process is, for messages."""
        return f"rank {self.rank} on {self.node}"


def crew_from(environment: Mapping[str, str]) -> Crew | None:
    """The crew that a launcher put this process into; None where it runs by itself.

    torchrun sets RANK and WORLD_SIZE. In a step of Slurm's srun it is SLURM_PROCID and SLURM_STEP_NUM_TASKS;
    a batch script has SLURM_PROCID and SLURM_NTASKS too, and runs by itself.
    """
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            found = _number(environment, size)
            return Crew(rank=_number(environment, rank), size=found) if found > 1 else None
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{name}={printable(text, 40)} is not a number; a launcher sets it, or unset it")
    return int(text)
