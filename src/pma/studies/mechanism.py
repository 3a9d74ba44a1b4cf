"""Why merging works: slope and curvature around the merge, and how the checkpoints' deviations meet under the
Hessian.
"""

# W windows, K checkpoints of a window, B batches of text

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.analysis import spectra
from pma.analysis.curvature import Surface
from pma.analysis.parameters import Vector
from pma.studies import landscape, mechanism_telling, ranking
from pma.studies.lab import HELD_OUT, VALIDATION, Lab
from pma.studies.landscape import over_batches, rounded
from pma.studies.making import Anneal, Trunk
from pma.studies.measuring import Measured
from pma.studies.presets import Preset
from pma.studies.tuning import anneal, trunks

__all__ = ["VERSION", "draw", "run", "tell"]
VERSION = 1
MOST_ENDS = 8
PREDICT_WINDOWS, MEASURE_WINDOWS, SPECTRUM_WINDOWS = 64, 192, 32
BATCHES = 8
EIGENVALUES, LANCZOS_STEPS = 3, 12
tell, draw = mechanism_telling.tell, mechanism_telling.draw
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Space:
    """A run's models by step, and two texts apart: `predict` is where derivatives are taken, `measure` where
    losses are; `spectrum` is a part of the first.
    """

    checkpoint: Callable[[int], Vector]
    predict: Surface
    measure: Surface
    spectrum: Surface


def run(lab: Lab) -> dict[str, Any]:
    """Windows, matrices and spectra of the middle sizes, first seed."""
    preset = lab.preset
    chosen = [trunks(lab, preset.size(name))[lab.seeds[0]] for name in preset.middle]
    forks = [[anneal(lab, trunk, step) for step in preset.fork_steps] for trunk in chosen]
    lab.make([fork for each in forks for fork in each])
    work = [(lab.home, preset, trunk, each) for trunk, each in zip(chosen, forks, strict=True)]
    context = preset.size(preset.middle[0]).recipe.text.context_tokens
    return {
        "seed": lab.seeds[0],
        "last": preset.last,
        "every_steps": preset.every_steps,
        "predict_tokens": PREDICT_WINDOWS * context,
        "measure_tokens": MEASURE_WINDOWS * context,
        "spectrum_tokens": SPECTRUM_WINDOWS * context,
        "lanczos_steps": LANCZOS_STEPS,
        "models": lab.map(of_run, work),
    }


def of_run(home: Path, preset: Preset, trunk: Trunk, forks: list[Anneal]) -> dict[str, Any]:
    """All that is asked of one model."""
    space = _space(home, preset, trunk)
    windows = [row for end in window_ends(preset) for row in _windows(space, preset, end)]
    matrices = []
    for fork in forks:
        at = fork.step + fork.steps
        annealed = landscape.vector(Measured(run=fork, at=at), home)
        matrices.append({"step": at, "around": "annealed", **_matrix(space, preset, at, annealed)})
    last_end = forks[-1].step + forks[-1].steps
    matrices.append({"step": last_end, "around": "merge", **_matrix(space, preset, last_end, None)})
    return {
        "size": trunk.recipe.name,
        "rate": trunk.recipe.optimizer.learning_rate,
        "windows": windows,
        "telling": _telling(windows),
        "matrices": matrices,
        "spectrum": _spectrum(space, preset, last_end),
    }


def window_ends(preset: Preset) -> list[int]:
    """Steps at which windows end, evenly to the end of the run, a usual window or more apart."""
    every = preset.every_steps
    ends = min(MOST_ENDS, preset.steps // (preset.last * every))
    return [preset.steps * i // ends // every * every for i in range(1, ends + 1)]


def _space(home: Path, preset: Preset, trunk: Trunk) -> Space:
    scorer = landscape.load(Measured(run=trunk, at=preset.steps), home)

    def text(where: str, count: int) -> Any:
        return landscape.text_windows(
            scorer,
            trunk,
            home,
            where,
            characters=preset.characters_a_document,
            context_tokens=trunk.recipe.text.context_tokens,
            count=count,
        )

    return Space(
        checkpoint=lambda step: landscape.vector(Measured(run=trunk, at=step), home),
        predict=landscape.surface(scorer, text(VALIDATION, PREDICT_WINDOWS), batches=BATCHES),
        measure=landscape.surface(scorer, text(HELD_OUT, MEASURE_WINDOWS), batches=2 * BATCHES),
        spectrum=landscape.surface(scorer, text(VALIDATION, SPECTRUM_WINDOWS), batches=BATCHES // 2),
    )


def _windows(space: Space, preset: Preset, end: int) -> list[dict[str, Any]]:
    """Windows that end at `end`: half as many and as many checkpoints as usual, as far apart and twice."""
    warmup = preset.size(preset.middle[0]).recipe.optimizer.warmup_steps
    shapes = [
        (last, every)
        for last in (max(2, preset.last // 2), preset.last)
        for every in (preset.every_steps, 2 * preset.every_steps)
        if end - (last - 1) * every >= warmup
    ]
    steps = sorted({end - every * back for last, every in shapes for back in range(last)})
    vectors = {step: space.checkpoint(step) for step in steps}
    last_loss_B = space.measure.losses(vectors[end]) if shapes else np.zeros(0)
    return [_window(space, vectors, last_loss_B, end, last, every) for last, every in shapes]


def _window(
    space: Space, vectors: Mapping[int, Vector], last_loss_B: Values, end: int, last: int, every: int
) -> dict[str, Any]:
    merge = np.mean([vectors[end - every * back] for back in range(last)], axis=0)
    deviation = vectors[end] - merge
    expansion = space.predict.expand(merge, deviation[None])
    slope_B, curvature_B = expansion.slope_BK[:, 0], expansion.curvature_BKK[:, 0, 0]
    gain_B = last_loss_B - space.measure.losses(merge)
    return {
        "end": end,
        "last": last,
        "every": every,
        "distance": float(np.linalg.norm(deviation)),
        "slope": over_batches(slope_B, space.predict.share_B),
        "half_curvature": over_batches(curvature_B / 2, space.predict.share_B),
        "predicted": over_batches(slope_B + curvature_B / 2, space.predict.share_B),
        "measured": over_batches(gain_B, space.measure.share_B),
    }


def _telling(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """How the parts of the expansion, and the mere distance, rank the measured gains; and its size."""
    measured = [row["measured"]["value"] for row in windows]
    ends = [row["end"] for row in windows]
    told = {
        name: ranking.by_groups(
            ranking.rank_correlation, [row[name]["value"] for row in windows], measured, ends
        )
        for name in ("predicted", "slope", "half_curvature")
    }
    distances = [row["distance"] for row in windows]
    told["distance"] = ranking.by_groups(ranking.rank_correlation, distances, measured, ends)
    predicted = [row["predicted"]["value"] for row in windows]
    return {"rank": told, "ratio": ranking.by_groups(ranking.ratio, predicted, measured, ends)}


def _matrix(space: Space, preset: Preset, at: int, around: Vector | None) -> dict[str, Any]:
    """δᵢᵀHδⱼ of the checkpoints of the usual window up to `at`, about a model, by default their merge."""
    steps = [at - preset.every_steps * back for back in reversed(range(preset.last))]
    points = np.array([space.checkpoint(step) for step in steps])
    merge = points.mean(axis=0)
    reference = merge if around is None else around
    matrix_BKK = space.predict.expand(reference, points - reference).curvature_BKK
    k, share_B = len(steps), space.predict.share_B
    trace_B = np.trace(matrix_BKK, axis1=1, axis2=2)
    all_B = matrix_BKK.sum(axis=(1, 2))
    members_B = np.mean([space.measure.losses(point) for point in points], axis=0)
    matrix_KK = np.tensordot(share_B, matrix_BKK, 1)
    return {
        "steps": steps,
        "matrix": rounded(matrix_KK),
        "pairs": k * (k - 1) // 2,
        "negative_pairs": int((matrix_KK[np.triu_indices(k, 1)] < 0).sum()),
        "off_diagonal": over_batches((all_B - trace_B) / (k * (k - 1)), share_B),
        "diagonal": over_batches(trace_B / k, share_B),
        # (k − 1) Σ δᵢᵀHδᵢ − Σ_(i≠j) δᵢᵀHδⱼ, of which the paper says that it is positive
        "inequality": over_batches(k * trace_B - all_B, share_B),
        "gap_predicted": over_batches((trace_B / k - all_B / k**2) / 2, share_B),
        "gap_measured": over_batches(members_B - space.measure.losses(merge), space.measure.share_B),
    }


def _spectrum(space: Space, preset: Preset, at: int) -> dict[str, Any]:
    """The Hessian's ends at the merge, and how the curvature along last − merge divides."""
    points = [space.checkpoint(at - preset.every_steps * back) for back in range(preset.last)]
    merge = np.mean(points, axis=0)
    deviation = points[0] - merge

    def product(direction: Values) -> Values:
        return space.spectrum.product(merge, direction)

    found = spectra.ends(product, len(merge), count=EIGENVALUES)
    along = spectra.measure(product, deviation, steps=LANCZOS_STEPS)
    return {
        "parameters": len(merge),
        "largest": rounded(found.largest_K),
        "largest_residual": rounded(found.largest_residual_K),
        "smallest": rounded(found.smallest_K),
        "smallest_residual": rounded(found.smallest_residual_K),
        "half_upward": along.positive / 2,
        "half_downward": along.negative / 2,
    }
