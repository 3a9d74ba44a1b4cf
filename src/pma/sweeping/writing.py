"""The merges of a sweep, each in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from pma import engine
from pma.cluster import connected
from pma.engine import Plan
from pma.engine.commit import check_room
from pma.remote import RemotePath
from pma.sweeping.grid import Cell, Sweep


def targets(sweep: Sweep, folder: Path) -> dict[int, Path]:
    """For each plan the folder in `folder` that it is written to: cells of like content share the first one's
    name.
    """
    return {cell.plan: folder / cell.name for cell in reversed(sweep.cells)}


def unwritten(sweep: Sweep, folder: Path) -> list[tuple[Plan, Path]]:
    """What of the sweep is not in `folder` yet, made from the same plan."""
    places = sorted(targets(sweep, folder).items())
    return [(sweep.plans[p], out) for p, out in places if not engine.is_written(sweep.plans[p], out)]


def write(sweep: Sweep, folder: Path, **how: Unpack[engine.How]) -> list[tuple[Cell, Path]]:
    """Write what is not there yet of the cells' merges into folders of `folder`; `how` as in
    `engine.write`. On a cluster they are written one after the other, each by all nodes.
    """
    missing = unwritten(sweep, folder)
    if (on := how.get("ray")) is None:
        engine.sweep_to_folders(missing, **how)
    elif missing:
        # what goes to a store needs room on the nodes, which see to it
        check_room([(plan, path) for plan, path in missing if not isinstance(path, RemotePath)])
        with connected(on):  # once for all
            for plan, path in missing:
                engine.write(plan, path, **how)
    out = targets(sweep, folder)
    return [(cell, out[cell.plan]) for cell in sweep.cells]
