"""Which nodes of a cluster measure models, while nodes come and go: on a cluster that is an object here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pma.cluster import Node, OnRay
from pma.engine.on_ray.checking import check_all
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.workers import Workers
from pma.errors import StorageError, UsageError
from pma.evaluation.on_ray import OnNodes

CORES = Node(key="c", name="node c", slots=1, cores=4.0)
MORE_CORES = Node(key="d", name="node d", slots=1, cores=4.0)
GPU = Node(key="g", name="node g", slots=1, cores=4.0, gpus=1.0)
MODELS = 40


@dataclass
class World:
    """A cluster whose nodes are others once a model is measured, and whose models they are. A look takes half
    a second.
    """

    nodes_now: list[Node]
    later: list[Node]
    on_nodes: OnNodes = field(default_factory=lambda: OnNodes(OnRay(), threads=2, most_per_node=1))
    begun_on: list[str] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    now: float = 0.0

    # as a Cluster

    def nodes(self) -> list[Node]:
        return self.nodes_now

    def start(self, node: Node, *look: object, cores: float) -> object:
        return object()

    def begin(self, node: Node, *made_of: object, cores: float, gpus: float) -> Node:
        self.begun_on.append(node.name)
        return node

    def ask(self, made: Node, method: str, *arguments: object) -> object:
        return object()

    def ended(self, tasks: Sequence[object], seconds: float) -> list[object]:
        self.now += 0.5
        if self.done:
            self.nodes_now = self.later
        return list(tasks)

    def answer(self, task: object) -> Any:
        return {}

    def end(self, made: Sequence[Node]) -> None:
        pass

    def await_end(self, tasks: Sequence[object], seconds: float) -> None:
        pass

    # as whose work it is

    def room(self, node: Node) -> Any:
        return self.on_nodes.room(node)

    def arguments(self, job: Sequence[int]) -> tuple[Any, ...]:
        return ()

    def begun(self, item: int) -> None:
        pass

    def heard(self, item: int, answer: Mapping[str, Any]) -> int:
        self.done.append(item)
        return 1

    def name(self, item: int) -> str:
        return f"model {item}"

    def check(self) -> None:
        pass

    def measure(self) -> None:
        cluster: Any = self
        used = self.on_nodes.used
        nodes = check_all(cluster, b"", 10, used=used)
        told, clock = self.told.append, lambda: self.now
        roster = Roster(cluster, nodes, on=OnRay(), packed=b"", tell=told, used=used, clock=clock)
        jobs = [range(MODELS // 2), range(MODELS // 2, MODELS)]
        Workers[int](cluster, roster, Node, tell=told).carry_out(jobs, cluster)


@pytest.mark.parametrize(
    ("first", "later", "begun_on"),
    [
        ([CORES], [CORES, GPU], {"node c"}),
        ([CORES], [CORES, MORE_CORES], {"node c", "node d"}),
        ([CORES, GPU], [CORES, MORE_CORES, GPU], {"node g"}),
    ],
)
def test_nodes_that_join_are_used_if_they_are_of_the_same_kind(
    first: list[Node], later: list[Node], begun_on: set[str]
) -> None:
    world = World(first, later)
    world.measure()
    assert sorted(world.done) == list(range(MODELS))
    assert set(world.begun_on) == begun_on
    assert world.told == []


def test_where_the_last_gpu_goes_nothing_is_measured_on_processors() -> None:
    world = World([CORES, GPU], [CORES])
    with pytest.raises(StorageError, match="no node of the Ray cluster can go on: all with GPUs are gone"):
        world.measure()
    assert world.begun_on == ["node g"]
    assert 120 <= world.now < 130
    with pytest.raises(UsageError, match="the Ray cluster has no node with GPUs"):
        world.measure()
