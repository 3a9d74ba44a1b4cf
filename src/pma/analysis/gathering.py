"""Every model of a window as it comes by, once: its losses, and what is wanted of its parameters and
routing.
"""

# M models, D documents

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pma import engine
from pma.analysis import routing, windows
from pma.analysis.halves import Halves
from pma.analysis.parameters import Layout, Vector
from pma.analysis.routing import Routing
from pma.analysis.windows import TokenWindows
from pma.engine import Plan
from pma.engine.provenance import check_unchanged
from pma.errors import InputError
from pma.evaluation.evaluate import evaluate
from pma.evaluation.model import load_scorer
from pma.evaluation.scoring import Scorer
from pma.evaluation.text import Document

if TYPE_CHECKING:
    from torch import Tensor

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which models, by number, to keep more of than losses: parameters; routing (on the half that is reported
    on, so many tokens in windows of at most `context_tokens`); one, ready to score.
    """

    vectors: Collection[int]
    routing: Collection[int]
    scorer: int
    routing_tokens: int
    context_tokens: int


@dataclass(kw_only=True)
class Gathered:
    """What was kept, by the models' numbers. `no_routing`: why a mixture's routing is not there."""

    nats: dict[int, Values] = field(default_factory=dict)
    token_D: Values = field(default_factory=lambda: np.zeros(0))
    vectors: dict[int, Vector] = field(default_factory=dict)
    routings: dict[int, Routing] = field(default_factory=dict)
    no_routing: str | None = None
    scorer: Scorer | None = None


def gather(
    plans: Sequence[Plan],
    halves: Halves,
    wanted: Wanted,
    *,
    context_tokens: int | None = None,
    announce: Callable[[int], None] = lambda number: None,
) -> Gathered:
    """Make every plan's model in memory, from as few reads as possible, and evaluate it as `pma eval` does;
    `announce` hears how many were done.
    """
    gathered = Gathered()

    def use(number: int, tensors: dict[str, Tensor]) -> None:
        announce(len(gathered.nats))
        check_unchanged(plans[number])  # or what is told would be of other weights
        scorer = load_scorer(tensors, plans[number].sources[-1].point.path, context_tokens=context_tokens)
        found = evaluate(str(number), scorer, halves.documents, cloze=0)
        gathered.nats[number] = np.array(found.nats)
        gathered.token_D = np.array(found.tokens, dtype=np.float64)
        if number in wanted.vectors:
            parameters = dict(scorer.model.named_parameters())
            gathered.vectors[number] = Layout.of_model(scorer.model).vector(parameters)
        if number in wanted.routing:
            _keep_routing(gathered, number, scorer, halves, wanted)
        if number == wanted.scorer:
            gathered.scorer = scorer

    engine.sweep_in_memory(plans, use)
    return gathered


def _keep_routing(gathered: Gathered, number: int, scorer: Scorer, halves: Halves, wanted: Wanted) -> None:
    if not routing.has_experts(scorer.model) or gathered.no_routing is not None:
        return
    try:
        text = token_windows(
            scorer,
            halves.half(chooses=False),
            context_tokens=wanted.context_tokens,
            tokens=wanted.routing_tokens,
        )
        gathered.routings[number] = routing.of_model(scorer.model, text)
    except InputError as error:
        gathered.no_routing = str(error)


def token_windows(
    scorer: Scorer, documents: Sequence[Document], *, context_tokens: int, tokens: int
) -> TokenWindows:
    """Windows of the documents, the same for all models of one tokenizer."""
    encoded = [scorer.encode(document.text) for document in documents]
    context = min(scorer.context_tokens, context_tokens)
    return windows.fitting(encoded, context_tokens=context, tokens=tokens)
