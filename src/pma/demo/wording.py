"""What the demo's report says in words, from its numbers; also where they show nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pma.demo.steps import LAST, Demo
from pma.evaluation.compare import Row
from pma.evaluation.paired import Estimate
from pma.quantities import count_text


def lead(demo: Demo) -> str:
    """What was trained."""
    kind = "mixture of experts" if "moe" in demo.recipe.name else "dense model"
    return (
        f"A small {kind} ({demo.recipe.name}), {count_text(demo.recipe.run.tokens)} tokens at constant "
        f"learning rate {demo.recipe.optimizer.learning_rate:g}; its last {LAST} checkpoints averaged."
    )


def protocol(demo: Demo, documents: int) -> str:
    """How the models were compared."""
    return (
        f"All models are evaluated on the same {documents} held-out documents; differences are paired by "
        "document, ± is one standard error over documents. Gain recovered is (last − model) / (last − "
        f"annealed). Annealing trained {count_text(demo.anneal_tokens)} tokens longer, so the constant run "
        "and its merge at that length stand beside it."
    )


def curve_protocol(characters: int) -> str:
    """What the curve of held-out losses shows."""
    return (
        f"On the first {characters:,} characters of each held-out document. The annealed fork is drawn from "
        "where it starts to where it ends."
    )


def verdict(demo: Demo, rows: Sequence[Row]) -> str:
    """What was found, in a sentence or two."""
    by_name = {row.name: row for row in rows}
    merge, annealed = by_name["sma"], by_name["annealed"]
    assert merge.improvement is not None
    assert annealed.improvement is not None
    text = (
        f"The simple average of the last {LAST} checkpoints {_changes(merge.improvement)}, for no training."
    )
    text += f" Annealing for {count_text(demo.anneal_tokens)} tokens more {_changes(annealed.improvement)}"
    share = merge.gain_recovered
    if share is None:
        return f"{text}, so there is no gain of annealing to recover."
    return (
        f"{text}: the merge recovered {100 * share.value:.0f}% ± {100 * share.standard_error:.0f}% of that."
    )


def _changes(improvement: Estimate) -> str:
    size = f"{abs(improvement.value):.3f} ± {improvement.standard_error:.3f} nats a token"
    if improvement.low <= 0 <= improvement.high:
        return f"does not change held-out loss beyond its error ({size})"
    return f"{'lowers' if improvement.value > 0 else 'raises'} held-out loss by {size}"
