"""Inner products of checkpoints by the nodes of a Ray cluster: each adds up some blocks, this process adds
the sums in the order of the blocks.
"""

# N checkpoints, G groups of tensors

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pma.cluster import Node, NodeProgress, OnRay, connected
from pma.engine import provenance
from pma.engine.gram import GroupOf, InnerProducts, Sums, bytes_to_read, of_sums, sums_of
from pma.engine.on_ray import recipes
from pma.engine.on_ray.answers import Answer, answered
from pma.engine.on_ray.checking import check_all
from pma.engine.on_ray.recipes import Recipe, again, recipe
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.sharing import part_count
from pma.engine.on_ray.workers import Job, Room, Workers
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stream import Progress

_PARTS_PER_SLOT = 16

# a part's number, and the part
Item = tuple[int, Part]


def inner_products(
    plan: Plan,
    group_of: GroupOf,
    *,
    on: OnRay,
    progress: Progress | None = None,
    show: Callable[[Sequence[NodeProgress]], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> InnerProducts:
    """As `gram.inner_products`, but for the last digits of fp64, as sums are of parts. `group_of` is called
    on the nodes too.

    Raises also UsageError or StorageError for a cluster that cannot be used, MismatchError where a node sees
    other sources.
    """
    sums = _Adding(plan, group_of, progress)
    with connected(on) as cluster:
        seen = recipes.packed([plan])
        nodes = check_all(cluster, seen, on.node_seconds, recipes.__name__)
        roster = Roster(cluster, nodes, on=on, packed=seen, look_in=recipes.__name__, tell=tell)
        workers = Workers[Item](cluster, roster, _Adder, recipe(plan), group_of, show=show, tell=tell)
        parts = plan.partition(part_count(plan, {}, _PARTS_PER_SLOT * workers.room(sums)))
        try:
            workers.carry_out([[item] for item in enumerate(parts) if len(item[1])], sums)
        finally:
            workers.end()
    return of_sums(plan, group_of, sums.all())


class _Adder:
    """On a node: adds up blocks of a plan that it makes once."""

    def __init__(self, made_by: Recipe, group_of: GroupOf, who: str) -> None:
        self._recipe, self._group_of, self._who = made_by, group_of, who
        self._plan: Plan | None = None

    def alive(self) -> Answer:
        """At once."""
        return {}

    def take(self) -> Answer:
        """Plan, the first time."""
        return answered(self._who, self._make_plan)

    def carry_out(self, item: Item) -> Answer:
        """The sums of a part."""
        return answered(self._who, lambda: self._add(item[1]))

    def _make_plan(self) -> Answer:
        if self._plan is None:
            (self._plan,) = again([self._recipe], self._who, {})
        return {}

    def _add(self, part: Part) -> Answer:
        assert self._plan is not None
        sums = sums_of(self._plan, self._group_of, numbers=part)
        return {"gram_GNN": sums.gram_GNN, "read": sums.bytes_read}


class _Adding:
    """In the process that drives: keeps the sums of parts, and adds them up in the end."""

    def __init__(self, plan: Plan, group_of: GroupOf, progress: Progress | None) -> None:
        self._plan, self._group_of, self._progress = plan, group_of, progress
        self._sums: dict[int, Sums] = {}

    def all(self) -> Sums:
        """In the order of parts, whoever was first."""
        ordered = [self._sums[number] for number in sorted(self._sums)]
        none = sums_of(self._plan, self._group_of, numbers=())
        return Sums(
            gram_GNN=sum((each.gram_GNN for each in ordered), none.gram_GNN),
            bytes_read=sum(each.bytes_read for each in ordered),
        )

    def room(self, node: Node) -> Room:
        """As many as read at once there, each with the cores of its threads."""
        cores = min(float(self._plan.options.threads), node.cores)
        return Room(workers=max(1, min(node.slots, int(node.cores / cores))), cores=cores)

    def arguments(self, job: Job[Item]) -> tuple[Any, ...]:
        """None: a part goes with its item."""
        return ()

    def begun(self, item: Item) -> None:
        """Nobody asks."""

    def heard(self, item: Item, answer: Mapping[str, Any]) -> int:
        """Keep the sums of a part."""
        self._sums[item[0]] = Sums(gram_GNN=answer["gram_GNN"], bytes_read=answer["read"])
        if self._progress is not None:
            self._progress(answer["read"], bytes_to_read(self._plan))
        return 1

    def name(self, item: Item) -> str:
        """A part's."""
        return f"part {item[0]}"

    def check(self) -> None:
        """Of the plan's sources."""
        provenance.check_unchanged(self._plan)
