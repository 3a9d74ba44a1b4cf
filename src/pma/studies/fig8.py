"""Figure 8: loss on planes through checkpoints and their merge."""

# P parameters, K checkpoints, G batches of text

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.analysis import planes
from pma.analysis.curvature import Surface
from pma.analysis.parameters import Vector
from pma.analysis.planes import Grid, Plane
from pma.studies import fig8_telling, landscape, seeds
from pma.studies.lab import HELD_OUT, VALIDATION, Lab
from pma.studies.landscape import over_batches, rounded
from pma.studies.making import Anneal
from pma.studies.measuring import Measured
from pma.studies.presets import Preset
from pma.studies.tuning import anneal, trunks

__all__ = ["VERSION", "draw", "run", "tell"]
VERSION = 1
GRID_POINTS, TOY_GRID_POINTS = 17, 9
MARGIN = 0.5
GRID_WINDOWS, MEASURE_WINDOWS = 32, 192
BATCHES = 8
tell, draw = fig8_telling.tell, fig8_telling.draw
Values = NDArray[np.float64]


def run(lab: Lab) -> dict[str, Any]:
    """Two planes for each middle size, first seed, at the end of training."""
    preset = lab.preset
    chosen = [trunks(lab, preset.size(name))[lab.seeds[0]] for name in preset.middle]
    forks = [anneal(lab, trunk) for trunk in chosen]
    lab.make(forks)
    context = preset.size(preset.middle[0]).recipe.text.context_tokens
    return {
        "seed": lab.seeds[0],
        "last": preset.last,
        "every_steps": preset.every_steps,
        "grid_tokens": GRID_WINDOWS * context,
        "measure_tokens": MEASURE_WINDOWS * context,
        "models": lab.map(of_run, [(lab.home, preset, fork) for fork in forks]),
    }


def of_run(home: Path, preset: Preset, fork: Anneal) -> dict[str, Any]:
    """The planes of one run, at the end of its fork."""
    at, trunk = fork.step + fork.steps, fork.trunk
    steps = [at - preset.every_steps * back for back in reversed(range(preset.last))]
    points = np.array([landscape.vector(Measured(run=trunk, at=step), home) for step in steps])
    annealed = landscape.vector(Measured(run=fork, at=at), home)
    scorer = landscape.load(Measured(run=trunk, at=at), home)

    def surface(where: str, count: int) -> Surface:
        text = landscape.text_windows(
            scorer,
            trunk,
            home,
            where,
            characters=preset.characters_a_document,
            context_tokens=trunk.recipe.text.context_tokens,
            count=count,
        )
        return landscape.surface(scorer, text, batches=count // 12 if where == HELD_OUT else BATCHES)

    held_out, validation = surface(HELD_OUT, MEASURE_WINDOWS), surface(VALIDATION, GRID_WINDOWS)
    three = [0, preset.last // 2, preset.last - 1]
    flat, shares = planes.principal(points)
    count = TOY_GRID_POINTS if preset.name == "toy" else GRID_POINTS
    through = planes.through(points[three])
    return {
        "size": trunk.recipe.name,
        "rate": trunk.recipe.optimizer.learning_rate,
        "step": at,
        "three": {
            **_on_plane(through, points[three], [steps[i] for i in three], annealed, validation, count),
            **_gains(points[three], annealed, held_out),
        },
        "principal": {
            **_on_plane(flat, points, steps, annealed, validation, count),
            **_gains(points, annealed, held_out),
            "variance_shares": rounded(shares[:2]),
        },
    }


def _on_plane(
    plane: Plane, points: Values, steps: list[int], annealed: Vector, surface: Surface, count: int
) -> dict[str, Any]:
    """Losses on the plane, and where checkpoints, merge (its origin), annealed model and minimum lie."""
    at_K2, annealed_2 = plane.coordinates(points), plane.coordinates(annealed)[0]
    shown = np.vstack([at_K2, annealed_2])
    x_X, y_Y = (planes.axis(shown[:, i].tolist(), points=count, margin=MARGIN) for i in (0, 1))
    grid = planes.grid(surface.losses, plane, x_X, y_Y)
    loss_YX = np.tensordot(surface.share_B, grid.losses_GYX, 1)
    lowest = planes.minimum(x_X, y_Y, loss_YX)
    return {
        "x": rounded(x_X),
        "y": rounded(y_Y),
        "loss": rounded(loss_YX),
        "steps": steps,
        "checkpoints": rounded(at_K2),
        "annealed": rounded(annealed_2),
        "annealed_distance": float(plane.distances(annealed)[0]),
        "minimum": None if lowest is None else list(lowest),
        "nearer": _nearer(grid, at_K2, surface.share_B),
    }


def _nearer(grid: Grid, at_K2: Values, share_G: Values) -> dict[str, Any] | None:
    """How much nearer the minimum the merge is than the nearest checkpoint, and than they are on average;
    by jackknife over batches. None where any part of the text has its minimum outside.
    """
    batches = len(share_G)
    kept = [np.arange(batches) != left_out for left_out in range(batches)]
    weights = [share_G, *(share_G * keep / (share_G * keep).sum() for keep in kept)]
    rows = []
    for weight_G in weights:
        lowest = planes.minimum(grid.x_X, grid.y_Y, np.tensordot(weight_G, grid.losses_GYX, 1))
        if lowest is None:
            return None
        away_K = np.linalg.norm(at_K2 - np.array(lowest), axis=1)
        merge = float(np.linalg.norm(lowest))
        rows.append([away_K.min() - merge, away_K.mean() - merge, merge, away_K.min(), away_K.mean()])
    whole, parts = np.array(rows[0]), np.array(rows[1:])
    pseudo_GV = batches * whole - (batches - 1) * parts
    names = ("than_nearest", "than_mean", "merge", "nearest", "mean")
    return {name: seeds.of_values(pseudo_GV[:, v].tolist()).to_json() for v, name in enumerate(names)}


def _gains(points: Values, annealed: Vector, surface: Surface) -> dict[str, Any]:
    """Held-out losses, and how far each model lies above the points' mean."""
    merge_B = surface.losses(points.mean(axis=0))
    losses_KB = [surface.losses(point) for point in points]
    annealed_B = surface.losses(annealed)
    return {
        "merge_loss": over_batches(merge_B, surface.share_B),
        "gain_over": [over_batches(loss_B - merge_B, surface.share_B) for loss_B in losses_KB],
        "annealed_over_merge": over_batches(merge_B - annealed_B, surface.share_B),
    }
