"""A table of models against last: loss, bits per byte, cloze, paired differences, and the share of
annealing's gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pma.evaluation.evaluate import Evaluation, cloze_difference, loss_difference
from pma.evaluation.paired import Estimate, gain_recovered


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. `improvement`: loss of the baseline minus its loss; None in the baseline's own row."""

    name: str
    loss: Estimate
    bits_per_byte: float
    cloze: float | None
    improvement: Estimate | None
    cloze_improvement: Estimate | None
    gain_recovered: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare(evaluations: Sequence[Evaluation], annealed: Evaluation | None = None) -> list[Row]:
    """Rows for `evaluations`, the first of which is the baseline; with `annealed`, also the gain recovered.

    Raises InputError where they were not evaluated on the same text.
    """
    baseline = evaluations[0]
    rows = []
    for evaluation in evaluations:
        own = evaluation is baseline
        share = None
        if annealed is not None and not own and evaluation is not annealed:
            loss_difference(baseline, annealed)  # refuses what cannot be paired
            share = gain_recovered(baseline.nats, evaluation.nats, annealed.nats, baseline.tokens)
        rows.append(
            Row(
                name=evaluation.name,
                loss=evaluation.loss,
                bits_per_byte=evaluation.bits_per_byte,
                cloze=evaluation.cloze_accuracy,
                improvement=None if own else loss_difference(baseline, evaluation),
                cloze_improvement=None if own else cloze_difference(evaluation, baseline),
                gain_recovered=share,
            )
        )
    return rows
