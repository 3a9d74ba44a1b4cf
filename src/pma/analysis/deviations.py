"""How the loss bends where a window's checkpoints lie about their merge: slopes and curvatures along their
deviations, and along the directions in which they vary most.
"""

# P parameters, K checkpoints of a window, J principal directions, B batches of text

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.analysis.curvature import Expansion, Surface, over_batches
from pma.evaluation.paired import Estimate

Values = NDArray[np.float64]
#: of the largest variance: directions with less are rounding
_SMALLEST_VARIANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One checkpoint: how far it is from the merge, gᵀd and ½ dᵀHd along the way there."""

    step: int | None
    distance: float
    slope: Estimate
    half_curvature: Estimate


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A principal direction u of length one, pointing to last's side: its share of the checkpoints' variance,
    last's coordinate along it, gᵀu, uᵀHu, and its part of the gain that is predicted.
    """

    variance_share: float
    last_coordinate: float
    slope: Estimate
    curvature: Estimate
    part_of_gain: Estimate


@dataclass(frozen=True, kw_only=True)
class Bending:
    """The second-order expansion about the merge. `predicted`: L(last) − L(merge) by slope and curvature
    along δ = last − merge; `measured`: the same from losses on the same text; `missed`: measured less
    predicted. `best_t`: where on the line from last (0) to merge (1) the parabola is lowest; None where it
    does not curve upwards. `parabola`: gᵀδ and δᵀHδ, of which it is made.
    """

    tokens: int
    deviations: tuple[Deviation, ...]
    directions: tuple[Direction, ...]
    predicted: Estimate
    measured: Estimate
    missed: Estimate
    parabola: tuple[float, float]
    best_t: float | None


def bending(
    surface: Surface,
    merge_P: ArrayLike,
    points_KP: ArrayLike,
    *,
    steps: Sequence[int | None],
) -> Bending:
    """Expand the loss about the merge along the deviations of its checkpoints, the last of which is last."""
    merge, points_KP = np.asarray(merge_P), np.asarray(points_KP)
    deviations_KP = points_KP - merge
    found = surface.expand(merge, deviations_KP)
    share_B = surface.share_B
    half_BK = np.einsum("bkk->bk", found.curvature_BKK) / 2
    predicted_B = found.slope_BK[:, -1] + half_BK[:, -1]
    measured_B = surface.losses(points_KP[-1]) - found.loss_B
    slope, curvature = float(share_B @ found.slope_BK[:, -1]), 2 * float(share_B @ half_BK[:, -1])
    return Bending(
        tokens=surface.tokens,
        deviations=tuple(
            Deviation(
                step=step,
                distance=float(np.linalg.norm(deviations_KP[k])),
                slope=over_batches(found.slope_BK[:, k], share_B),
                half_curvature=over_batches(half_BK[:, k], share_B),
            )
            for k, step in enumerate(steps)
        ),
        directions=_directions(deviations_KP, found, share_B),
        predicted=over_batches(predicted_B, share_B),
        measured=over_batches(measured_B, share_B),
        missed=over_batches(measured_B - predicted_B, share_B),
        parabola=(slope, curvature),
        # at t the model is merge + (1 − t) δ
        best_t=1 + slope / curvature if curvature > 0 else None,
    )


def _directions(deviations_KP: Values, found: Expansion, share_B: Values) -> tuple[Direction, ...]:
    """Principal directions as mixtures of the deviations, so that no further products are needed: the
    expansion along mixtures follows from that along the deviations.
    """
    variance_J, mixtures_JK = principal_mixtures(deviations_KP)
    slope_BJ = found.slope_BK @ mixtures_JK.T
    curvature_BJJ = mixtures_JK @ found.curvature_BKK @ mixtures_JK.T
    # δ's coordinates; what of it is outside the directions is rounding
    at_J = mixtures_JK @ (deviations_KP @ deviations_KP[-1])
    part_BJ = at_J * (slope_BJ + curvature_BJJ @ at_J / 2)
    return tuple(
        Direction(
            variance_share=float(variance_J[j]),
            last_coordinate=float(at_J[j]),
            slope=over_batches(slope_BJ[:, j], share_B),
            curvature=over_batches(curvature_BJJ[:, j, j], share_B),
            part_of_gain=over_batches(part_BJ[:, j], share_B),
        )
        for j in range(len(at_J))
    )


def principal_mixtures(deviations_KP: ArrayLike) -> tuple[Values, Values]:
    """Shares of variance about the merge, falling, shape (J,), and the mixtures of the deviations that are
    directions of length one, shape (J, K). Signs: last, the newest, has coordinates that are not negative.
    """
    deviations = np.asarray(deviations_KP, dtype=np.float64)
    gram_KK = deviations @ deviations.T
    values, vectors_KK = np.linalg.eigh(gram_KK)
    values, vectors_KK = values[::-1], vectors_KK[:, ::-1]
    kept = values > _SMALLEST_VARIANCE * max(values[0], np.finfo(float).tiny)
    mixtures_JK = (vectors_KK[:, kept] / np.sqrt(values[kept])).T
    signs_J = np.where(mixtures_JK @ gram_KK[:, -1] < 0, -1.0, 1.0)
    return values[kept] / values[kept].sum(), signs_J[:, None] * mixtures_JK
