"""Models made in memory from plans, and measured: nothing of them is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pma import engine
from pma.engine import Plan
from pma.engine.provenance import check_unchanged
from pma.evaluation.measures import Measure, Result

if TYPE_CHECKING:
    from torch import Tensor

# called with tensors by name, the checkpoint whose configuration and tokenizer they go with, context_tokens
Load = Callable[..., Any]
# hears the model's place among those that are wanted, what was measured of it, and what that gave
Told = Callable[[int, Measure, Result], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A merge, by what name its results call it, and what is to be measured of it."""

    plan: Plan
    name: str
    measures: Sequence[Measure]


class Measuring(Protocol):
    """What makes models and measures them, here or elsewhere: `measured` is one."""

    def __call__(
        self,
        wanted: Sequence[Wanted],
        told: Told,
        *,
        context_tokens: int | None = None,
        begun: Callable[[int], None] = lambda place: None,
        load: Load | None = None,
    ) -> None:
        """Tell each result once, from this thread, as it comes. `begun` hears the place of a model that is
        made, before it is measured. `load`: makes what the measures score, by default `load_scorer`.

        Raises MismatchError where a source changed, and what making a model and measuring it raise.
        """


def measured(
    wanted: Sequence[Wanted],
    told: Told,
    *,
    context_tokens: int | None = None,
    begun: Callable[[int], None] = lambda place: None,
    load: Load | None = None,
) -> None:
    """In this process, one model after the other, from as few passes over the checkpoints as memory
    allows.
    """
    make = load or default_load()

    def use(place: int, tensors: dict[str, Tensor]) -> None:
        plan = wanted[place].plan
        begun(place)
        check_unchanged(plan)  # or a result would be kept under the name of what was there before
        scorer = make(tensors, plan.sources[-1].point.path, context_tokens=context_tokens)
        for measure in wanted[place].measures:
            told(place, measure, measure.run(wanted[place].name, scorer))

    engine.sweep_in_memory([each.plan for each in wanted], use)


def default_load() -> Load:
    """What makes a scorer of a transformers model; torch is imported here."""
    from pma.evaluation.model import load_scorer

    return load_scorer
