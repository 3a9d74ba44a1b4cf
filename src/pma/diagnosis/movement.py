"""How far, how straight and along which directions checkpoints moved: figures from their inner products
alone.
"""

# N checkpoints oldest first, U = N - 1 updates between neighbours, K principal directions

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.diagnosis.walk import FEWEST_CHECKPOINTS, Walk, fit, squared_distances
from pma.errors import InputError

Floats = NDArray[np.float64]
_DIRECTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Of some tensors, `elements` values.

    `path`: the lengths of all updates together; `distance`: from the oldest checkpoint to the newest.
    `cosines_UU`: between updates. `neighbours`: mean cosine of one update with the next. `newest_norm`,
    `members_norm` (mean) and `merge_norm`: lengths of weights. `removed`: from the newest checkpoint to the
    merge. `shares_K`, `coordinates_KN`: principal directions, shares of the variance around the mean and
    where checkpoints lie along them. `walk`: None for fewer than four checkpoints.
    """

    elements: int
    path: float
    distance: float
    cosines_UU: Floats
    neighbours: float | None
    newest_norm: float
    members_norm: float
    merge_norm: float
    removed: float
    shares_K: Floats
    coordinates_KN: Floats
    walk: Walk | None

    def to_json(self, steps_N: Sequence[float]) -> dict[str, Any]:
        """Plain values; JSON has no NaN."""
        walk = self.walk
        every = float(np.median(np.diff(steps_N)))
        return {
            "elements": self.elements,
            "path": self.path,
            "distance": self.distance,
            "straightness": self.distance / self.path if self.path else None,
            "update_cosines": _rounded(self.cosines_UU),
            "neighbour_cosine": self.neighbours,
            "newest_norm": self.newest_norm,
            "members_norm": self.members_norm,
            "merge_norm": self.merge_norm,
            "newest_to_merge": self.removed,
            "principal_shares": _rounded(self.shares_K),
            "principal_coordinates": _rounded(self.coordinates_KN),
            "drift_a_step": None if walk is None else walk.speed,
            "drift_share": None if walk is None else walk.drift_share(steps_N[-1] - steps_N[0]),
            "noise": None if walk is None else float(np.sqrt(walk.noise + walk.fresh)),
            "forgetting_steps": None if walk is None else 1 / walk.rate,
            "autocorrelation": None if walk is None else walk.memory(every),
            "effective_checkpoints": None if walk is None else walk.effective(steps_N),
            "misfit": None if walk is None else walk.misfit,
        }


def movement(
    steps_N: Sequence[float], elements: int, deviations_NN: ArrayLike, newest_N: ArrayLike
) -> Movement:
    """From inner products of deviations from the newest checkpoint, and of that one with each deviation
    (the last entry with itself). Raises InputError for fewer than two checkpoints.
    """
    gram, newest = np.asarray(deviations_NN, np.float64), np.asarray(newest_N, np.float64)
    count = len(gram)
    if count < 2:
        raise InputError("one checkpoint does not move: a diagnosis needs at least two, better ten")
    updates_UN = np.diff(np.eye(count), axis=0)
    updates_UU = updates_UN @ gram @ updates_UN.T
    lengths_U = np.sqrt(np.maximum(np.diag(updates_UU), 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines_UU = updates_UU / np.outer(lengths_U, lengths_U)
    beside = np.diag(cosines_UU, 1)
    beside = beside[np.isfinite(beside)]
    own = newest[-1]
    cross_N = np.append(newest[:-1], 0.0)
    norms_N = np.sqrt(np.maximum(own + 2 * cross_N + np.diag(gram), 0))
    mean_N = np.full(count, 1 / count)
    shares_K, coordinates_KN = _principal(gram)
    return Movement(
        elements=elements,
        path=float(lengths_U.sum()),
        distance=float(np.sqrt(squared_distances(gram)[0, -1])),
        cosines_UU=cosines_UU,
        neighbours=float(beside.mean()) if len(beside) else None,
        newest_norm=float(np.sqrt(own)),
        members_norm=float(norms_N.mean()),
        merge_norm=float(np.sqrt(max(own + 2 * cross_N @ mean_N + mean_N @ gram @ mean_N, 0))),
        removed=float(np.sqrt(max(mean_N @ gram @ mean_N, 0))),
        shares_K=shares_K,
        coordinates_KN=coordinates_KN,
        walk=fit(steps_N, gram) if count >= FEWEST_CHECKPOINTS else None,
    )


def _principal(gram: Floats) -> tuple[Floats, Floats]:
    """Shares and coordinates of the first directions, each pointing so that the newest lies at its positive
    end.
    """
    count = len(gram)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centring @ gram @ centring)
    order = np.argsort(values)[::-1][: min(_DIRECTIONS, count - 1)]
    top = np.maximum(values[order], 0)
    total = max(float(np.maximum(values, 0).sum()), np.finfo(np.float64).tiny)
    coordinates_KN = np.sqrt(top)[:, None] * vectors[:, order].T
    return top / total, coordinates_KN * np.where(coordinates_KN[:, -1:] < 0, -1, 1)


def _rounded(values: Floats) -> Any:
    """Nested lists, six digits, None where there is no number."""
    flat = [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.ravel()]
    return np.array(flat, dtype=object).reshape(values.shape).tolist()
