"""Does the merge send tokens to last's experts? Against what two neighbouring checkpoints agree on anyway."""

# L layers, T tokens, E experts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.analysis.routing import Routing, agreement, balance, over_documents
from pma.evaluation.paired import Estimate

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two models: the share of a token's experts that are the same, over all layers; by layer; and the share
    of tokens, by layer, whose experts are all the same.
    """

    mean: Estimate
    by_layer: tuple[float, ...]
    whole_by_layer: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Load:
    """How even one model's loads are, by layer: entropy over that of equal loads, and the largest load over
    the mean.
    """

    entropy: tuple[float, ...]
    heaviest: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Routing of last, of the merge and of last's neighbour in the window. `more`: by how much last agrees
    more with the merge than with its neighbour. `chance`: what two that know nothing of each other agree on.
    """

    tokens: int
    experts: int
    top: int
    merge: Agreement
    neighbour: Agreement
    more: Estimate
    last_load: Load
    merge_load: Load

    @property
    def chance(self) -> float:
        return self.top / self.experts


def compare(*, last: Routing, merge: Routing, neighbour: Routing) -> Experts:
    """Agreement and balance on one text."""
    with_merge, with_neighbour = agreement(last, merge), agreement(last, neighbour)
    document_T = last.document_T
    return Experts(
        tokens=len(document_T),
        experts=last.experts,
        top=last.chosen_LTK.shape[-1],
        merge=_agreement(with_merge, document_T),
        neighbour=_agreement(with_neighbour, document_T),
        more=over_documents((with_merge - with_neighbour).mean(axis=0), document_T),
        last_load=_load(last),
        merge_load=_load(merge),
    )


def _agreement(agreed_LT: Values, document_T: NDArray[np.int64]) -> Agreement:
    return Agreement(
        mean=over_documents(agreed_LT.mean(axis=0), document_T),
        by_layer=tuple(map(float, agreed_LT.mean(axis=1))),
        whole_by_layer=tuple(map(float, (agreed_LT == 1).mean(axis=1))),
    )


def _load(routing: Routing) -> Load:
    told = balance(routing.load())
    return Load(
        entropy=tuple(map(float, told.entropy_L)),
        heaviest=tuple(map(float, told.heaviest_L)),
    )
