"""What a search found, as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pma.sweeping.candidates import Contender
from pma.sweeping.searching import Outcome, Ranked

if TYPE_CHECKING:
    from pma.evaluation.evaluate import Evaluation
    from pma.evaluation.paired import Estimate


def findings(outcome: Outcome) -> dict[str, Any]:
    """Budget and what was spent; rungs; winner, plain window and last checkpoint on the half of the text that
    was not chosen by; what the winner gained on the half it was chosen by beyond that, over the last
    checkpoint and over the plain window. That no candidate was chosen by: the halves differ for it only by
    chance.

    Gains are over the last checkpoint, paired by document, positive where the merge is better.
    """
    from pma.evaluation.evaluate import loss_difference

    halves, reported, selected = outcome.halves, outcome.reported, outcome.selected
    gain_selected = loss_difference(selected["last"], selected["winner"])
    gain_reported = loss_difference(reported["last"], reported["winner"])
    below_plain = loss_difference(reported["plain"], reported["winner"])
    return {
        "budget": outcome.budget,
        "evaluations": outcome.evaluations,
        "tokens_read": outcome.tokens_read,
        "tokens_known": outcome.tokens_known,
        "candidates": len(outcome.ranked),
        "skipped": list(outcome.field.skipped),
        "parts": len(halves.parts),
        "documents": {"selection": len(halves.selection), "report": len(halves.report)},
        "tokens": {"selection": sum(selected["last"].tokens), "report": sum(reported["last"].tokens)},
        "rungs": [asdict(rung) for rung in outcome.rungs],
        "winner": {
            **described(outcome.winner),
            "selection": {"loss": asdict(selected["winner"].loss), "gain": asdict(gain_selected)},
            "report": _scored(reported["winner"], reported["last"]),
        },
        "plain": {
            **described(outcome.field.plain),
            "report": _scored(reported["plain"], reported["last"]),
        },
        "last": {
            **described(outcome.field.last),
            "report": {"loss": asdict(reported["last"].loss)},
        },
        "winner_is_longest": _is_longest(outcome),
        "winner_is_plain": outcome.winner.plan == outcome.field.plain.plan,
        "winner_below_plain": asdict(below_plain),
        "flattered_by": _difference(gain_selected, gain_reported),
        "flattered_beyond_plain": _difference(
            loss_difference(selected["plain"], selected["winner"]), below_plain
        ),
        "ranked": [_row(ranked, outcome) for ranked in outcome.ranked],
    }


def _is_longest(outcome: Outcome) -> bool:
    """Whether the winner is a window with as many checkpoints as any: longer ones may be better still."""
    most = max(window.last for window in outcome.field.windows)
    return outcome.winner.best_of is None and outcome.winner.last == most


def described(contender: Contender) -> dict[str, Any]:
    """Which merge it is."""
    return {
        "name": contender.words,
        "scheme": contender.scheme,
        "last": contender.last,
        "every": None if contender.every is None else str(contender.every),
        "at": contender.at,
        "best_of": contender.best_of,
        "weights": contender.weights,
        "steps": [point.step for point in contender.points],
    }


def _row(ranked: Ranked, outcome: Outcome) -> dict[str, Any]:
    share = ranked.parts / len(outcome.halves.parts)
    return {**described(ranked.contender), "parts": ranked.parts, "share": share, "loss": ranked.loss}


def _difference(selected: Estimate, reported: Estimate) -> dict[str, float]:
    """Of estimates on different documents, which are independent."""
    return {
        "value": selected.value - reported.value,
        "standard_error": math.hypot(selected.standard_error, reported.standard_error),
    }


def _scored(own: Evaluation, last: Evaluation) -> dict[str, Any]:
    from pma.evaluation.evaluate import loss_difference

    return {
        "loss": asdict(own.loss),
        "gain": asdict(loss_difference(last, own)),
        "bits_per_byte": own.bits_per_byte,
    }
