"""Models that read parts of a text: what each scored, how much was read, and how much of that was new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pma.engine import Plan
from pma.evaluation.making import Load, Measuring, measured
from pma.evaluation.measures import Measure, text_measure
from pma.evaluation.text import Document
from pma.results import Store
from pma.sweeping.evaluating import Asked, evaluate_each
from pma.sweeping.grid import Plans
from pma.sweeping.halves import Halves, Shares
from pma.sweeping.halving import Sums

if TYPE_CHECKING:
    from pma.evaluation.evaluate import Evaluation

_REPORT = "report"


def losses(documents: Sequence[Document], context_tokens: int | None) -> Measure:
    """The losses of documents, without cloze."""
    return text_measure(documents, cloze=0, context_tokens=context_tokens)


@dataclass(frozen=True, kw_only=True)
class How:
    """How models read. `measure`: what is measured on documents. `begin` hears what is about to be read and
    which plans lack it; `announce`, `load` and `measuring` as for `evaluate_each`.
    """

    context_tokens: int | None = None
    measure: Callable[[Sequence[Document], int | None], Measure] = losses
    begin: Callable[[str, Sequence[Plan]], None] = lambda what, plans: None
    announce: Callable[[str], None] = lambda text: None
    load: Load | None = None
    measuring: Measuring = measured


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A plan's model is to read these parts of the half that is chosen by, and with `report` the other."""

    place: int
    parts: range = range(0)
    report: bool = False


class Reader:
    """Reads each part with a model once. `tokens_read`: of all models together, also what was known before,
    which is all but `tokens_new`.
    """

    def __init__(self, plans: Plans, halves: Halves, store: Store, how: How) -> None:
        self.tokens_new = 0
        self._plans, self._halves, self._store, self._how = plans, halves, store, how
        self._parts = [self._measure(f"part {n}", part) for n, part in enumerate(halves.parts)]
        self._report = self._measure(_REPORT, halves.report)
        self._read: dict[tuple[int, str], Evaluation] = {}

    def read(self, what: str, asked: Sequence[Asking]) -> None:
        """Read what was not read before, in as few passes over the checkpoints as memory allows."""
        missing: dict[int, list[Measure]] = {}
        for each in asked:
            wanted = [self._parts[part] for part in each.parts] + [self._report] * each.report
            for measure in wanted:
                of_place = missing.setdefault(each.place, [])
                if (each.place, measure.name) not in self._read and measure not in of_place:
                    of_place.append(measure)
        plans, keys = self._plans.plans, self._plans.keys
        done, _ = evaluate_each(
            [Asked(plan=plans[place], key=keys[place], measures=ms) for place, ms in missing.items()],
            self._store,
            context_tokens=self._how.context_tokens,
            announce=self._how.announce,
            begin=lambda lacking: self._how.begin(what, lacking),
            new=self._count,
            load=self._how.load,
            measuring=self._how.measuring,
        )
        for place, results in zip(missing, done, strict=True):
            self._read |= {(place, name): evaluation for name, evaluation in results.items()}

    def sums(self, place: int, parts: range) -> Sums:
        """Nats and tokens of a model on parts that it has read."""
        read = [self._read[place, self._parts[part].name] for part in parts]
        return sum(sum(each.nats) for each in read), sum(sum(each.tokens) for each in read)

    def on_selection(self, place: int) -> Evaluation:
        """On the whole half that is chosen by, which the model has read."""
        from pma.evaluation.evaluate import joined

        return joined([self._read[place, measure.name] for measure in self._parts])

    def on_report(self, place: int) -> Evaluation:
        """On the other half."""
        return self._read[place, _REPORT]

    @property
    def tokens_read(self) -> int:
        return sum(sum(evaluation.tokens) for evaluation in self._read.values())

    def shares(self, place: int) -> Shares:
        """By the tokens of a model that has read all of the text."""
        parts = [sum(self._read[place, measure.name].tokens) for measure in self._parts]
        return Shares.of(parts, sum(self.on_report(place).tokens))

    def readings(self, shares: Shares) -> float:
        """What was read, in readings of the whole text by one model."""
        names = [measure.name for measure in self._parts]
        share_of = dict(zip([*names, _REPORT], [*shares.parts, shares.report], strict=True))
        return sum(share_of[name] for _, name in self._read)

    def _measure(self, name: str, documents: Sequence[Document]) -> Measure:
        """With a name of its own."""
        return replace(self._how.measure(documents, self._how.context_tokens), name=name)

    def _count(self, evaluation: Any) -> None:
        self.tokens_new += sum(evaluation.tokens)
