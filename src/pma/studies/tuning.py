"""The learning rate of each size, chosen before any claim: the lowest loss after a decay, on validation
text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pma.studies.lab import VALIDATION, Lab
from pma.studies.making import Anneal, Trunk
from pma.studies.measuring import Measured
from pma.studies.presets import Size


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A size's rates and what each gave, and the rate that was chosen."""

    size: Size
    rate: float
    rows: tuple[dict[str, Any], ...]


def trunk(lab: Lab, size: Size, rate: float, seed: int) -> Trunk:
    """The run of a size at a constant rate."""
    # studies of one size go on from many of its checkpoints; the other sizes are only annealed
    steps = None if size.name in lab.preset.middle else (*lab.preset.fork_steps, lab.preset.steps)
    return Trunk(recipe=size.at(rate, seed), text=lab.data.text, resumable_steps=steps)


def anneal(lab: Lab, run: Trunk, step: int | None = None, shape: str = "cosine") -> Anneal:
    """The decay of the preset's length from `step` of the run, by default the last fork."""
    preset = lab.preset
    return Anneal(trunk=run, step=step or preset.fork_steps[-1], steps=preset.anneal_steps, shape=shape)


def tuned(lab: Lab, sizes: tuple[Size, ...]) -> dict[str, Tuned]:
    """Each size with its rate. Made of the first seed alone; the runs are the studies' own."""
    seed = lab.seeds[0]
    forks = {
        (size.name, rate): anneal(lab, trunk(lab, size, rate, seed)) for size in sizes for rate in size.rates
    }
    lab.make(forks.values())
    end = lab.preset.fork_steps[-1] + lab.preset.anneal_steps
    wanted = [Measured(run=fork, at=end) for fork in forks.values()]
    wanted += [Measured(run=fork.trunk, at=end) for fork in forks.values()]
    readings = lab.measure(wanted, where=VALIDATION, cloze=0)
    losses = [reading.text.loss.value for reading in readings]
    rows = [
        {"size": name, "rate": rate, "annealed": losses[i], "constant": losses[len(forks) + i]}
        for i, (name, rate) in enumerate(forks)
    ]
    return {size.name: _chosen(size, rows) for size in sizes}


def _chosen(size: Size, rows: list[dict[str, Any]]) -> Tuned:
    mine = [row for row in rows if row["size"] == size.name]
    best = min(mine, key=lambda row: row["annealed"])
    return Tuned(size=size, rate=best["rate"], rows=tuple(mine))


def trunks(lab: Lab, size: Size) -> dict[int, Trunk]:
    """The size's run at its tuned rate, by seed."""
    rate = tuned(lab, (size,))[size.name].rate
    return {seed: trunk(lab, size, rate, seed) for seed in lab.seeds}
