"""Commands that a launcher, torchrun or srun, started in several processes: who speaks, and of what."""

from __future__ import annotations

import os
from typing import Any

from pma.cli.output import note
from pma.engine import Crew, Merge, crew_from
from pma.errors import UsageError
from pma.quantities import bytes_text


def launched(*, measures_roofline: bool = False) -> Crew | None:
    """The processes that this one was started with; None where it is alone."""
    crew = crew_from(os.environ)
    if crew is not None and measures_roofline:
        raise UsageError("--measure-roofline measures one process; leave it out under torchrun and srun")
    return crew


def speaks(crew: Crew | None) -> bool:
    """Whether this process shows progress and the result of all."""
    return crew is None or crew.leads


def told_by_another(crew: Crew, done: Merge) -> dict[str, Any]:
    """A line of what this process did; its result is none, as rank 0 gives that of all."""
    if done.bytes_written:
        note(
            f"{crew.name}: read {bytes_text(done.bytes_read)}, wrote {bytes_text(done.bytes_written)} in "
            f"{done.stream_seconds:.1f} s"
        )
    return {}
