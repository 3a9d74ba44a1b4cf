"""What is to be streamed: one merge, or several that are cut into the same blocks and share their reads."""

# N checkpoints, K merges

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pma.averaging import equal
from pma.engine.blocks import Blocks
from pma.engine.memory_budget import tile_bytes_within
from pma.engine.plan import Plan
from pma.formats.contracts import CheckpointReader


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one merge is made from readers that several merges share.

    `members`: (number of the reader, weight), oldest first. `divisor`: for equal weights, which are then 1:
    the sum is divided once.
    """

    members: tuple[tuple[int, float], ...]
    divisor: int | None

    @property
    def newest(self) -> int:
        return self.members[-1][0]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One or more merges, cut into the same blocks, from readers that they share."""

    readers: Sequence[CheckpointReader]
    recipes: Sequence[Recipe]
    blocks: Blocks
    tile_bytes: int
    threads: int
    allow_nonfinite: bool = False


def work_of(plan: Plan) -> Work:
    """The work of one plan."""
    return shared_work([plan])


def shared_work(plans: Sequence[Plan]) -> Work:
    """The work of several plans that `alike` found alike, each checkpoint read once.

    Members keep each plan's own order; readers are numbered so that they are read oldest first.
    """
    readers: dict[Path, CheckpointReader] = {}
    for plan in sorted(plans, key=lambda plan: -len(plan.readers)):
        readers |= {reader.path: reader for reader in plan.readers if reader.path not in readers}
    for reader in readers.values():
        _ = reader.layout_digest  # finds where all tensors lie: what is damaged shows before the work
    order = _order(plans, list(readers))
    members_K = [[order.index(reader.path) for reader in plan.readers] for plan in plans]
    # a merge begins with its first member: what was added to it before that would be lost
    assert all(members == sorted(members) for members in members_K)
    first = plans[0]
    options = first.options
    return Work(
        readers=[readers[path] for path in order],
        recipes=[_recipe(members, plan.weights) for members, plan in zip(members_K, plans, strict=True)],
        blocks=first.blocks,
        tile_bytes=tile_bytes_within(options.memory_bytes, options.threads, merges=len(plans)),
        threads=options.threads,
        allow_nonfinite=options.allow_nonfinite,
    )


def _order(plans: Sequence[Plan], paths: list[Path]) -> list[Path]:
    """Paths in an order in which every plan finds its own: by step where the steps are known."""
    if len(plans) == 1:
        return [reader.path for reader in plans[0].readers]
    steps = {s.point.path: s.point.step for plan in plans for s in plan.sources}
    return sorted(paths, key=lambda path: steps[path] or 0)


def alike(one: Plan, other: Plan) -> bool:
    """Whether two plans are cut into the same blocks and treat each tensor alike."""
    same_layout = one.layout == other.layout and one.policies == other.policies
    return same_layout and one.tensors == other.tensors and _how(one) == _how(other)


def _how(plan: Plan) -> tuple[int, int, bool, str]:
    # checkpoints themselves and their stored means have one path, and so share no pass
    options = plan.options
    return options.threads, options.memory_bytes, options.allow_nonfinite, options.use


def _recipe(readers: Sequence[int], weights: Sequence[float]) -> Recipe:
    if equal(np.asarray(weights, dtype=np.float64)):
        return Recipe(members=tuple((number, 1.0) for number in readers), divisor=len(readers))
    return Recipe(members=tuple(zip(readers, map(float, weights), strict=True)), divisor=None)
