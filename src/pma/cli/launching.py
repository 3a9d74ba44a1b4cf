"""Commands that a launcher, torchrun or srun, started in several processes: who speaks, what is refused."""

from __future__ import annotations

import os

from pma.engine import Crew, crew_from
from pma.errors import UsageError

# what reads headers or logs at most may run in any number of processes; of a RUN, forecast refuses itself
_TOGETHER, _ANYHOW = ("init", "merge"), ("forecast", "inspect", "plan", "spikes")
_NAMED = {"evaluate": "eval"}


def launched(*, measures_roofline: bool = False) -> Crew | None:
    """The processes that this one was started with; None where it is alone."""
    crew = crew_from(os.environ)
    if crew is not None and measures_roofline:
        raise UsageError("--measure-roofline measures one process; leave it out under torchrun and srun")
    return crew


def refuse_repeated(command: str) -> None:
    """Raises UsageError where a launcher started a command that each of several processes would do alone."""
    command = _NAMED.get(command, command)
    if command in (*_TOGETHER, *_ANYHOW):
        return
    crew = crew_from(os.environ)
    if crew is not None:
        raise UsageError(
            f"pma {command} works in one process, and this one was started as rank {crew.rank} of "
            f"{crew.size}; start it without torchrun or srun (or unset RANK and WORLD_SIZE). Only pma merge "
            "and pma init share their work"
        )


def speaks(crew: Crew | None) -> bool:
    """Whether this process shows progress and the result of all."""
    return crew is None or crew.leads
