"""Work given to processes that keep what they made, and given again: on a cluster that is an object here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pma.cluster import Lost, Node, OnRay
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.workers import Room, Workers
from pma.engine.together.words import told_of
from pma.errors import MismatchError, NonfiniteError, StorageError

Item = str


@dataclass(eq=False)
class Process:
    """What a node made. `ended`: by whoever began it."""

    node: Node
    ended: bool = False


@dataclass(eq=False)
class Call:
    """What a process was asked."""

    process: Process
    method: str
    arguments: tuple[Any, ...]


@dataclass
class World:
    """A cluster whose processes answer as `answers` says, and whose work it is."""

    answers: Callable[[Call], Any] = lambda call: {}
    nodes_now: list[Node] = field(default_factory=lambda: [node("a"), node("b")])
    begun_on: list[str] = field(default_factory=list)
    asked: list[Call] = field(default_factory=list)
    done: list[Item] = field(default_factory=list)
    jobs: list[tuple[Item, ...]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    changed: bool = False

    # as a Cluster

    def nodes(self) -> list[Node]:
        return self.nodes_now

    def begin(self, node: Node, kind: type, *arguments: Any, cores: float, gpus: float) -> Process:
        self.begun_on.append(node.key)
        return Process(node)

    def ask(self, process: Process, method: str, *arguments: Any) -> Call:
        return Call(process, method, arguments)

    def ended(self, tasks: Sequence[Call], seconds: float) -> list[Call]:
        assert len(self.asked) < 1000, "it asks for ever"
        return list(tasks)

    def answer(self, call: Call) -> Any:
        self.asked.append(call)
        return self.answers(call)

    def end(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.ended = True

    # as whose work it is

    def room(self, node: Node) -> Room:
        return Room(workers=1, cores=1.0)

    def arguments(self, job: tuple[Item, ...]) -> tuple[Any, ...]:
        self.jobs.append(job)
        return ()

    def begun(self, item: Item) -> None:
        pass

    def heard(self, item: Item, answer: Mapping[str, Any]) -> int:
        self.done.append(item)
        return 1

    def name(self, item: Item) -> str:
        return f"item {item}"

    def check(self) -> None:
        if self.changed:
            raise MismatchError("a source was changed")

    def carry_out(self, *jobs: list[Item]) -> None:
        cluster: Any = self
        roster = Roster(cluster, self.nodes_now, on=OnRay(), packed=b"", tell=self.told.append)
        Workers[Item](cluster, roster, Process, tell=self.told.append).carry_out(jobs, cluster)


def node(key: str) -> Node:
    return Node(key=key, name=f"node {key}", slots=1, cores=4.0)


def item_of(call: Call) -> Item | None:
    return call.arguments[0] if call.method == "carry_out" else None


def test_every_item_is_done_once_by_processes_on_all_nodes() -> None:
    world = World()
    world.carry_out(["1", "2"], ["3"], ["4"])
    assert sorted(world.done) == ["1", "2", "3", "4"]
    assert sorted(world.begun_on) == ["a", "b"]
    assert world.told == []


def test_what_a_lost_process_had_told_is_not_asked_again() -> None:
    lost: list[Call] = []

    def answers(call: Call) -> Any:
        if item_of(call) == "2" and not lost:
            lost.append(call)
        return Lost(why="killed") if lost and call.process is lost[0].process else {}

    world = World(answers=answers)
    world.carry_out(["1", "2", "3"])
    assert world.done == ["1", "2", "3"]
    assert world.jobs == [("1", "2", "3"), ("2", "3")]
    assert lost[0].process.ended
    (told,) = world.told
    assert "item 2 is given to a node again: killed" in told


def test_what_fails_four_times_where_nodes_live_ends_the_work() -> None:
    world = World(answers=lambda call: Lost(why="killed") if item_of(call) == "2" else {})
    with pytest.raises(StorageError, match=r"item 2 failed 4 times, at last on node .: killed"):
        world.carry_out(["1"], ["2"])
    assert sum(item_of(call) == "2" for call in world.asked) == 4


def test_a_process_lost_with_its_node_costs_no_try() -> None:
    world = World(nodes_now=[node(key) for key in "abcdef"])

    def answers(call: Call) -> Any:
        if item_of(call) is None or len(world.nodes_now) == 1:
            return {}
        world.nodes_now = [each for each in world.nodes_now if each.key != call.process.node.key]
        return Lost(why="its node is gone")

    world.answers = answers
    world.carry_out(["1"])
    assert world.done == ["1"]
    assert len(world.begun_on) >= 5  # more nodes went than tries are allowed


def test_a_node_that_sees_other_files_is_left_out() -> None:
    refused = told_of(MismatchError("node a sees other files"))
    world = World(answers=lambda call: refused if call.process.node.key == "a" and item_of(call) else {})
    world.carry_out(["1"], ["2"])
    assert sorted(world.done) == ["1", "2"]
    assert "node a is given nothing: node a sees other files" in world.told


def test_where_all_nodes_see_other_files_it_ends_at_once() -> None:
    world = World(answers=lambda call: told_of(MismatchError("other files")) if item_of(call) else {})
    with pytest.raises(StorageError, match="no node of the Ray cluster can go on: other files; other files"):
        world.carry_out(["1"])
    world = World(answers=world.answers, changed=True)  # and where this process sees it too
    with pytest.raises(MismatchError, match="a source was changed"):
        world.carry_out(["1"])


def test_what_is_wrong_with_the_input_ends_it_at_once() -> None:
    world = World(answers=lambda call: told_of(NonfiniteError("w[3]: nan")) if item_of(call) else {})
    with pytest.raises(NonfiniteError, match=r"^w\[3\]: nan$"):
        world.carry_out(["1"])
    assert len(world.begun_on) == 1
