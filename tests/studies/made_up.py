"""Readings of models that were never trained: losses that are chosen, with chance by seed and document."""

from __future__ import annotations

import numpy as np

from pma.evaluation.evaluate import Evaluation
from pma.studies.cases import Case
from pma.studies.measuring import Reading

DOCUMENTS, TOKENS_A_DOCUMENT = 60, 100


def case(losses: dict[str, float], *, seeds: int = 3, chance: float = 0.002, cloze: bool = False) -> Case:
    """Models by name with these losses. All share the documents' own difficulty; `chance` is the rest."""
    rng = np.random.default_rng(len(losses))
    hard_D = rng.normal(0, 0.5, DOCUMENTS)
    return Case(
        readings={
            name: [_reading(loss + hard_D + rng.normal(0, chance, DOCUMENTS), cloze) for _ in range(seeds)]
            for name, loss in losses.items()
        }
    )


def _reading(loss_D: np.ndarray, cloze: bool) -> Reading:
    items = 2 * DOCUMENTS if cloze else 0
    text = Evaluation(
        name="made up",
        text_digest="the same",
        context_tokens=8,
        text_bytes=1_000,
        nats=tuple(map(float, loss_D * TOKENS_A_DOCUMENT)),
        tokens=(TOKENS_A_DOCUMENT,) * DOCUMENTS,
        cloze=tuple(i % 2 == 0 for i in range(items)),
        cloze_documents=tuple(i // 2 for i in range(items)),
    )
    return Reading(text=text, tasks={})
