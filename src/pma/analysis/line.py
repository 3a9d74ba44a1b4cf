"""The line from last through the merge and beyond: last + t (merge − last). The best t is chosen by one half
of the text and reported on the other.
"""

# N checkpoints, T places on the line, D documents

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.errors import InputError
from pma.evaluation.paired import Estimate, mean_estimate, paired_difference

Values = NDArray[np.float64]
LAST, MERGE = 0.0, 1.0
PLACES = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
_ERROR_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class Place:
    """The model at `t` on the half that is reported on: its loss, and how much lower than last's."""

    t: float
    loss: Estimate
    gain: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """What was found. `lowest_t`: where the loss is lowest on the half to choose by; `ahead`: by how much
    below the merge's there, with an interval that allows for how many places were compared; None if it is
    the merge. `t`: what is advised: the merge's place unless `ahead` is above zero, and last's where last is
    ahead of the merge too and the lowest place not of last. `at_the_edge`: lowest at the end of what was
    evaluated, so that the optimum may lie beyond.

    All else is of the other half: `places`; at `t` the `loss`, the `gain` over last, and the
    `gain_over_merge` (None at the merge itself). `last_loss`, `merge_loss`: on both halves together.
    """

    places: tuple[Place, ...]
    lowest_t: float
    ahead: Estimate | None
    at_the_edge: bool
    t: float
    loss: Estimate
    gain: Estimate
    gain_over_merge: Estimate | None
    last_loss: Estimate
    merge_loss: Estimate

    def at(self, t: float) -> Place:
        """The place `t`. Raises InputError where it was not evaluated."""
        for place in self.places:
            if place.t == t:
                return place
        evaluated = ", ".join(f"{place.t:g}" for place in self.places)
        raise InputError(
            f"t = {t:g} was not evaluated, and nothing is told of what was not; there are {evaluated}"
        )


def weights_at(t: float, weight_N: ArrayLike) -> tuple[float, ...]:
    """The weights of the window's checkpoints, oldest first, that give last + t (merge − last): on the line a
    model is a merge too, with weights that may be negative. `weight_N`: the merge's.
    """
    weights = t * np.asarray(weight_N, dtype=np.float64)
    weights[-1] += 1 - t
    return tuple(map(float, weights))


def search(t_T: Sequence[float], nats_TD: ArrayLike, token_D: ArrayLike, chooses_D: ArrayLike) -> Line:
    """Find the best place. `nats_TD`: each document's nats at each place; `chooses_D`: which documents to
    choose by. Places whose loss is not finite are left out.

    Raises InputError where last or merge is not among the places, or has no finite loss.
    """
    nats, tokens = np.asarray(nats_TD, dtype=np.float64), np.asarray(token_D, dtype=np.float64)
    rows = {t: row for t, row in zip(t_T, nats, strict=True) if np.isfinite(row).all()}
    if LAST not in rows or MERGE not in rows:
        raise InputError("last and merge need a finite loss on every document of the text")
    rows = dict(sorted(rows.items()))
    chooses = np.asarray(chooses_D, dtype=bool)
    lowest = min(rows, key=lambda t: float(rows[t][chooses].sum()))

    def ahead_of(other: float, at: float) -> Estimate | None:
        if at == other:
            return None
        return _of_many(rows[other][chooses], rows[at][chooses], tokens[chooses], len(rows) - 1)

    ahead = ahead_of(MERGE, lowest)
    t = _advised(lowest, ahead, ahead_of(LAST, lowest), ahead_of(MERGE, LAST))

    def gain(over: float, at: float) -> Estimate:
        return paired_difference(rows[over][~chooses], rows[at][~chooses], tokens[~chooses])

    def loss(at: float) -> Estimate:
        return mean_estimate(rows[at][~chooses], tokens[~chooses])

    return Line(
        places=tuple(Place(t=at, loss=loss(at), gain=None if at == LAST else gain(LAST, at)) for at in rows),
        lowest_t=lowest,
        ahead=ahead,
        at_the_edge=lowest in (min(rows), max(rows)),
        t=t,
        loss=loss(t),
        gain=gain(LAST, t),
        gain_over_merge=None if t == MERGE else gain(MERGE, t),
        last_loss=mean_estimate(rows[LAST], tokens),
        merge_loss=mean_estimate(rows[MERGE], tokens),
    )


def _advised(
    lowest: float, of_merge: Estimate | None, of_last: Estimate | None, last_of_merge: Estimate | None
) -> float:
    """Of places between which the text cannot tell, the merge, or else last, which is there already. Given:
    how far the lowest place is ahead of merge and of last, and last of the merge.
    """
    if not _sure(of_merge):
        return MERGE
    return lowest if _sure(of_last) or not _sure(last_of_merge) else LAST


def _sure(ahead: Estimate | None) -> bool:
    return ahead is not None and ahead.low > 0


def _of_many(worse_D: Values, better_D: Values, token_D: Values, candidates: int) -> Estimate:
    """The difference to the best of several candidates, with Bonferroni's interval: the best of many looks
    better than it is.
    """
    from scipy.special import stdtrit

    found = paired_difference(worse_D, better_D, token_D)
    level = 1 - _ERROR_RATE / 2 / candidates
    reach = float(stdtrit(len(token_D) - 1, level)) * found.standard_error
    return Estimate(
        value=found.value,
        standard_error=found.standard_error,
        low=found.value - reach,
        high=found.value + reach,
    )
