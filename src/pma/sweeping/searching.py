"""A budgeted search for the best merge of a run: chosen on one half of a text by successive halving, reported
on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pma.errors import UsageError
from pma.evaluation.text import Document
from pma.quantities import Tokens
from pma.results import Store
from pma.sweeping import halving
from pma.sweeping.candidates import Contender, Field, distinct, merges_of_best
from pma.sweeping.grid import Plans
from pma.sweeping.halves import Halves, Shares, halved
from pma.sweeping.halving import Rung, Standing
from pma.sweeping.reading import Asking, How, Reader

if TYPE_CHECKING:
    from pma.evaluation.evaluate import Evaluation

#: of what reading the whole text with every candidate would cost
DEFAULT_BUDGET_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A candidate, how many parts it had read when it was dropped or had won, and its loss on these."""

    contender: Contender
    parts: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found. `ranked`: the candidates, best first. `selected`: evaluations of winner, last
    checkpoint and plain window on the half that was chosen by; `reported`: on the other.

    `budget`, `evaluations`: in readings of the whole text by one model; `tokens_read` in all, of which
    `tokens_known` by searches before.
    """

    field: Field
    halves: Halves
    budget: float
    rungs: tuple[Rung, ...]
    ranked: tuple[Ranked, ...]
    selected: Mapping[str, Evaluation]
    reported: Mapping[str, Evaluation]
    evaluations: float
    tokens_read: int
    tokens_known: int

    @property
    def winner(self) -> Contender:
        return self.ranked[0].contender


def search(
    field: Field,
    plans: Plans,
    documents: Sequence[Document],
    budget: float | Tokens | None,
    store: Store,
    how: How,
) -> Outcome:
    """Search `field` within `budget`: readings of the whole text by one model, or tokens; by default a
    quarter of what every candidate would read. All that is read counts, also what is reported.

    Results are kept in `store`: an interrupted search goes on, a repeated one reads nothing. Raises
    InputError where the text cannot be halved, UsageError where the budget is too small to read a part with
    every candidate.
    """
    halves = halved(documents)
    reader = Reader(plans, halves, store, how)
    last = Asking(place=field.last.plan, parts=range(len(halves.parts)), report=True)
    shares = halves.shares
    if isinstance(budget, Tokens):
        reader.read("the last checkpoint", [last])
        shares, budget = reader.shares(last.place), budget.count / reader.tokens_read
    budget, first_parts = _fitted(field, shares, budget)
    # so does the plain window: how much it gains on either half tells them apart
    always = [last, replace(last, place=field.plain.plan)]
    contenders = _contenders(field, plans, reader, always, first_parts)
    # fewer where some have one content
    run = halving.rungs(len(contenders), first_parts, len(halves.parts))

    def read(numbers: Sequence[int], parts: range) -> list[halving.Sums]:
        what = f"{len(numbers)} candidates on parts {parts.start + 1} to {parts.stop} of {len(halves.parts)}"
        places = [contenders[number].plan for number in numbers]
        reader.read(what, [Asking(place=place, parts=parts) for place in places])
        return [reader.sums(place, parts) for place in places]

    standings = halving.race(len(contenders), run, read)
    winner = contenders[standings[0].number]
    reader.read("the winner on the other half", [Asking(place=winner.plan, report=True)])
    places = {"winner": winner.plan, "last": field.last.plan, "plain": field.plain.plan}
    return Outcome(
        field=field,
        halves=halves,
        budget=budget,
        rungs=run,
        ranked=tuple(_ranked(standing, contenders) for standing in standings),
        selected={name: reader.on_selection(place) for name, place in places.items()},
        reported={name: reader.on_report(place) for name, place in places.items()},
        evaluations=reader.readings(shares),
        tokens_read=reader.tokens_read,
        tokens_known=reader.tokens_read - reader.tokens_new,
    )


def _ranked(standing: Standing, contenders: Sequence[Contender]) -> Ranked:
    return Ranked(contender=contenders[standing.number], parts=standing.parts, loss=standing.loss)


def _fitted(field: Field, shares: Shares, budget: float | None) -> tuple[float, int]:
    """The budget, and how many parts each candidate reads at first so that it is kept.

    Read in any case: all of the text by last checkpoint and plain window, the reported half by the winner.
    """
    in_any_case = 2 + shares.report
    singles = max(0, len(field.pool) - 1)
    narrowest = halving.cost(halving.rungs(field.most, 1, len(shares.parts)), shares.parts)
    least = math.ceil(10 * (in_any_case + narrowest + singles * shares.parts[0])) / 10
    if budget is None:
        budget = max(DEFAULT_BUDGET_SHARE * field.most, least)
    planned = halving.widest(field.most, shares.parts, budget - in_any_case, also=singles)
    if planned is None:
        raise UsageError(
            f"--budget: {budget:.3g} readings of the whole text are too few for {field.most} candidates, "
            f"each of which reads at least {shares.parts[0]:.1%} of it; give at least {least:g}, or "
            "fewer candidates with --last, --every, --scheme, --best"
        )
    return budget, planned[0].parts


def _contenders(
    field: Field, plans: Plans, reader: Reader, always: Sequence[Asking], first_parts: int
) -> tuple[Contender, ...]:
    """All candidates. Those of the best checkpoints are known once each has read what is read at first; that
    is read together with what the others read, from one pass over the checkpoints.
    """
    first = range(first_parts)
    singles = {point.path: plans.raw(point) for point in field.pool}
    places = dict.fromkeys([*(contender.plan for contender in field.known), *singles.values()])
    asked = [Asking(place=place, parts=first) for place in places if place not in (a.place for a in always)]
    reader.read(f"{len(field.known)} candidates, {len(singles)} single checkpoints", [*always, *asked])
    losses = {path: _loss(reader.sums(place, first)) for path, place in singles.items()}
    return distinct((*field.known, *merges_of_best(field, losses, plans)))


def _loss(sums: halving.Sums) -> float:
    nats, tokens = sums
    return nats / tokens
