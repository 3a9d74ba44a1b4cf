"""Plans as they are told to other nodes, made again there, and found to be the same."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.engine import provenance
from pma.engine.lease import host
from pma.engine.on_ray.answers import Answer, answered
from pma.engine.on_ray.task import portable
from pma.engine.plan import MergeOptions, Plan
from pma.engine.planning import plan as planned
from pma.engine.together.views import difference, view
from pma.errors import MismatchError
from pma.formats.contracts import CheckpointReader
from pma.trajectory import TrajectoryPoint


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to plan, and what tells whether that gave the same plan, and the same files beside the weights."""

    points: tuple[TrajectoryPoint, ...]
    options: MergeOptions
    as_given: bool
    heading: dict[str, Any]
    beside: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Told:
    """Recipes, and what the process that tells them sees of the sources of all, as `views.view`."""

    recipes: tuple[Recipe, ...]
    sources: dict[str, Any]
    who: str


def recipe(plan: Plan) -> Recipe:
    """How another node makes the same plan."""
    points, options = portable(plan)
    heading = provenance.heading(plan)
    return Recipe(
        points=points, options=options, as_given=plan.as_given, heading=heading, beside=_beside(plan)
    )


def packed(plans: Sequence[Plan]) -> bytes:
    """What `look` wants to see, of all plans."""
    sources: dict[str, Any] = {}
    for plan in plans:
        sources |= view(plan)["sources"]
    recipes = tuple(recipe(plan) for plan in plans)
    return pickle.dumps(Told(recipes=recipes, sources=sources, who=f"the driver on {host()}"))


def look(packed: bytes, who: str) -> Answer:
    """On a node: whether it plans the same."""

    def work() -> Answer:
        told: Told = pickle.loads(packed)
        with opened() as readers:
            for each in told.recipes:
                plan = planned(each.points, each.options, as_given=each.as_given, opened=readers)
                _compare(each, plan, told, who)
        return {}

    return answered(who, work)


def again(recipes: Iterable[Recipe], who: str, readers: MutableMapping[Path, CheckpointReader]) -> list[Plan]:
    """On a node: the plans, with readers that they share. Raises MismatchError where one is another than was
    told.
    """
    plans = []
    for each in recipes:
        plan = planned(each.points, each.options, as_given=each.as_given, opened=readers)
        if provenance.heading(plan) != each.heading or _beside(plan) != each.beside:
            raise MismatchError(f"{who} sees other files of {each.points[-1].path.parent} than before")
        plans.append(plan)
    return plans


@contextmanager
def opened() -> Iterator[dict[Path, CheckpointReader]]:
    """Readers that plans share, by path; closed after the block."""
    readers: dict[Path, CheckpointReader] = {}
    try:
        yield readers
    finally:
        for reader in readers.values():
            reader.close()


def _compare(each: Recipe, plan: Plan, told: Told, who: str) -> None:
    mine = view(plan)
    paths = dict.fromkeys(str(provenance.absolute(point.path)) for point in each.points)
    known = {path: told.sources[path] for path in paths if path in told.sources}
    theirs = {"plan": each.heading, "sources": known}
    found = difference(mine, theirs, me=who, them=told.who)
    if found is None and (beside := _beside(plan)) != each.beside:
        names = sorted(name for name in {*beside, *each.beside} if beside.get(name) != each.beside.get(name))
        found = f"{who} sees another {names[0]} beside {each.points[-1].path} than {told.who}"
    if found is not None:
        raise MismatchError(f"{found}; every node has to see the same files")


def _beside(plan: Plan) -> dict[str, str]:
    return {name: blake3(data).hexdigest() for name, data in plan.side_files.items()}
