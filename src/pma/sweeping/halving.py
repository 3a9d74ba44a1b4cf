"""Successive halving: all candidates read a little of a text, the better ones more of it, the best all of it.

Source: Jamieson & Talwalkar, arXiv 1502.07943, section 3; differs: a candidate that stays reads only what it
has not read yet, and the first share of the text is as large as the budget allows, instead of as many rungs.
"""

# C candidates; S parts of the text

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: few rungs: each makes the merges that are left anew, from another pass over the checkpoints
KEEP_ONE_IN = 4

# so many nats on so many tokens
Sums = tuple[float, int]
# sums of each of these candidates, by number, on these parts
Read = Callable[[Sequence[int], range], Sequence[Sums]]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """`candidates` go on until they have read the first `parts` of the text."""

    candidates: int
    parts: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A candidate by number, how many parts it had read when it was dropped or won, and its loss on them."""

    number: int
    parts: int
    loss: float


def rungs(candidates: int, first_parts: int, parts: int) -> tuple[Rung, ...]:
    """From `first_parts` of the text's `parts`, four times as much at each rung, for a quarter of the
    candidates, but at least two of them.
    """
    made = [Rung(candidates=candidates, parts=first_parts)]
    while made[-1].parts < parts:
        kept = max(2, math.ceil(made[-1].candidates / KEEP_ONE_IN))
        made.append(Rung(candidates=min(candidates, kept), parts=min(parts, made[-1].parts * KEEP_ONE_IN)))
    return tuple(made)


def cost(planned: Sequence[Rung], part_costs_S: Sequence[float]) -> float:
    """What all candidates read, where a part costs one of them so much."""
    before, total = 0, 0.0
    for rung in planned:
        total += rung.candidates * sum(part_costs_S[before : rung.parts])
        before = rung.parts
    return total


def widest(
    candidates: int, part_costs_S: Sequence[float], budget: float, *, also: int = 0
) -> tuple[Rung, ...] | None:
    """The rungs whose first share of the text is the largest that the budget allows; None where no part is.

    `also`: so many other models read what is read at the first rung.
    """
    parts = len(part_costs_S)
    for first in range(parts, 0, -1):
        planned = rungs(candidates, first, parts)
        if cost(planned, part_costs_S) + also * sum(part_costs_S[:first]) <= budget:
            return planned
    return None


def race(candidates: int, planned: Sequence[Rung], read: Read) -> tuple[Standing, ...]:
    """Run the rungs over the candidates 0 … C-1; all of a rung read the same parts. Best first, then those
    that were dropped, the last dropped first. Of equal losses the lower number is the better.
    """
    nats_C, tokens_C = [0.0] * candidates, [0] * candidates
    left: list[Standing] = []
    running = list(range(candidates))
    before = 0
    for number, rung in enumerate(planned):
        sums = read(running, range(before, rung.parts))
        for candidate, (nats, tokens) in zip(running, sums, strict=True):
            nats_C[candidate] += nats
            tokens_C[candidate] += tokens
        before = rung.parts
        losses = {candidate: nats_C[candidate] / tokens_C[candidate] for candidate in running}
        order = sorted(running, key=lambda candidate: (losses[candidate], candidate))
        kept = planned[number + 1].candidates if number + 1 < len(planned) else 0
        dropped = [Standing(number=c, parts=rung.parts, loss=losses[c]) for c in order[kept:]]
        left = dropped + left
        running = sorted(order[:kept])
    return tuple(left)
