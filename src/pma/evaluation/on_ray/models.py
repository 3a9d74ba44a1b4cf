"""On a node: merges made in memory from one pass, and measured one after the other."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pma.cluster import kept
from pma.engine import Plan
from pma.engine.memory import average_all
from pma.engine.on_ray.answers import Answer, answered
from pma.engine.on_ray.recipes import Recipe, again, opened
from pma.engine.provenance import check_unchanged
from pma.engine.work import shared_work
from pma.evaluation.making import default_load
from pma.evaluation.measures import Measure

if TYPE_CHECKING:
    from torch import Tensor

# a model's place among those that are wanted, a measure's among the model's, and its key
Item = tuple[int, int, str]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Models that are made together, by place, and what is measured of them. `measures`: by key, and `load`:
    where the cluster keeps them.
    """

    recipes: dict[int, Recipe]
    names: dict[int, str]
    measures: dict[str, Any]
    load: Any | None
    context_tokens: int | None


class Models:
    """Makes the models of a batch and measures them; at most one of them is loaded at a time.

    `threads`: of torch, where there is no GPU.
    """

    def __init__(self, threads: int, who: str) -> None:
        self._threads, self._who = threads, who
        self._measures: dict[str, Measure] = {}
        self._made: dict[int, dict[str, Tensor]] = {}
        self._plans: dict[int, Plan] = {}
        self._batch: Batch | None = None
        self._readers = ExitStack()
        self._scorer: Any = None
        self._loaded: int | None = None

    def alive(self) -> Answer:
        """At once."""
        return {}

    def take(self, batch: Batch) -> Answer:
        """Make the merges of a batch from one pass over their checkpoints."""
        return answered(self._who, lambda: self._make(batch))

    def carry_out(self, item: Item) -> Answer:
        """Measure one thing of one of them."""
        return answered(self._who, lambda: self._measure(item[0], item[2]))

    def _make(self, batch: Batch) -> Answer:
        self._forget()
        self._batch = batch
        for key in batch.measures.keys() - self._measures.keys():
            self._measures[key] = kept(batch.measures[key])
        plans = again(batch.recipes.values(), self._who, self._readers.enter_context(opened()))
        read = 0

        def progress(more: int, _written: int) -> None:
            nonlocal read
            read += more

        made = average_all(shared_work(plans), plans, progress)
        self._plans = dict(zip(batch.recipes, plans, strict=True))
        self._made = dict(zip(batch.recipes, made, strict=True))
        return {"read": read}

    def _forget(self) -> None:
        self._made, self._plans = {}, {}
        self._scorer = self._loaded = None
        self._readers.close()
        gc.collect()

    def _measure(self, place: int, key: str) -> Answer:
        assert self._batch is not None
        if self._loaded != place:
            self._load(place, self._batch)
        return {"result": self._measures[key].run(self._batch.names[place], self._scorer).to_json()}

    def _load(self, place: int, batch: Batch) -> None:
        self._scorer = self._loaded = None
        gc.collect()  # before the next one takes its place
        plan = self._plans[place]
        check_unchanged(plan)  # or a result would be kept under the name of what was there before
        load = default_load() if batch.load is None else kept(batch.load)
        _use_threads(self._threads)
        tensors, like = self._made.pop(place), plan.sources[-1].point.path
        self._scorer = load(tensors, like, context_tokens=batch.context_tokens)
        self._loaded = place


def _use_threads(threads: int) -> None:
    """As many as there are cores for this process, whatever its environment says: rounding differs by it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        torch.set_num_threads(threads)
