"""What commands say of the means over steps that are stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pma.cli.output import note
from pma.engine import SNAPSHOTS

_OF = {"masters": "the fp32 masters", "weights": "the weights", "rounded weights": "the rounded weights"}
_SHOWN = 6


def note_means(description: Mapping[str, Any]) -> None:
    """Say, of a plan, which steps the means it uses leave out; or that there are means it could use."""
    used, beside = description["interval_means"], description["interval_means_beside"]
    if used is not None:
        note_gaps(used)
    elif beside:
        note(beside_text(beside, len(description["sources"])))


def note_gaps(used: Mapping[str, Any]) -> None:
    """Say which steps between the first and the last are in no mean."""
    gaps = [f"{first}–{last}" if last > first else f"{first}" for first, last in used["gaps"]]
    if gaps:
        more = f" and {len(gaps) - _SHOWN} more" if len(gaps) > _SHOWN else ""
        note(f"steps {', '.join(gaps[:_SHOWN])}{more} are in no mean")
    if used["updates_missing"]:
        note(f"{used['updates_missing']} updates within the intervals are in no mean")


def means_text(used: Mapping[str, Any]) -> str:
    """What the means of a plan are of together."""
    every = f", every {', '.join(map(str, used['every']))} steps" if used["every"] != [1] else ""
    whole = "" if used["gaps"] else ", without gaps"
    of = " and ".join(_OF[averaged] for averaged in used["averaged"])
    return (
        f"{len(used['intervals'])} interval means of {of}: {used['updates']} updates of steps "
        f"{used['first_step']} to {used['last_step']}{every}{whole}"
    )


def record_text(record: Mapping[str, Any]) -> str:
    """What one stored mean is of."""
    if "unusable_because" in record:
        return f"an interval mean that cannot be used: {record['unusable_because']}"
    every = f", every {record['every']} steps" if record["every"] != 1 else ""
    return (
        f"interval mean of {_OF[record['averaged']]}: {record['updates']} updates of steps "
        f"{record['first_step']} to {record['last_step']}{every}"
    )


def sources_text(use: str) -> str:
    """What a merge is of."""
    return "checkpoints" if use == SNAPSHOTS else "interval means"


def beside_text(beside: int, of: int) -> str:
    """That there are means, and how to use them."""
    return f"interval means are stored beside {beside} of {of} checkpoints: --use interval-means"
