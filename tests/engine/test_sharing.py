"""How parts are given to nodes and taken back: on a cluster that is an object here, and so is its time."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pma import engine, trajectory
from pma.cluster import Lost, Node, NodeProgress, OnRay
from pma.cluster.nodes import Cluster
from pma.engine.blocks import CHUNK_BYTES
from pma.engine.journal import Journal, part_journal
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.sharing import Sharing, part_count
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.stream import Digests
from pma.engine.together.words import told_of
from pma.errors import (
    Interrupted,
    MismatchError,
    NonfiniteError,
    PmaError,
    SpaceError,
    StorageError,
    UsageError,
)
from pma.testing import tiny_run

TOKEN = "ab" * 16
SHAPES = {"a": (9_000_000,), "b": (8_900_000,)}  # nine chunks


def node(key: str, slots: int = 1) -> Node:
    return Node(key=key, name=f"node {key}", slots=slots, cores=4.0)


@dataclass(eq=False)
class Task:
    """What a node was given. `end`: what happens to it, asked at each look until it gives an answer."""

    node: Node
    part: Part
    name: str
    given_at: float
    end: Iterator[Any] = field(default_factory=lambda: iter(()))


@dataclass(eq=False)
class Look:
    """A node that looks."""

    node: Node


Behaviour = Callable[["Task"], Iterator[Any]]


@dataclass(kw_only=True)
class World:
    """A cluster whose tasks do as `behave` says, the place of an output, and a clock."""

    plan: Plan
    folder: Path
    behave: Behaviour
    nodes_now: list[Node]
    look_fails: dict[str, PmaError] = field(default_factory=dict)
    now: float = 0.0
    tasks: list[Task] = field(default_factory=list)
    given: list[Task] = field(default_factory=list)
    taken_back: list[Task] = field(default_factory=list)
    called_off: list[str] = field(default_factory=list)
    most: Counter[str] = field(default_factory=Counter)
    answers: dict[int, Any] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    digests: Digests = field(default_factory=dict)
    token: str = TOKEN

    # as a Cluster

    def nodes(self) -> list[Node]:
        return self.nodes_now

    def start(self, node: Node, function: Any, *arguments: Any, cores: float) -> Any:
        if "carry_out" not in function.__name__:
            look = Look(node)
            self.looks.append(look)
            return look
        _, part, name, _ = arguments
        task = Task(node=node, part=part, name=name, given_at=self.now)
        task.end = self.behave(task)
        self.tasks.append(task)
        self.given.append(task)
        running = Counter(one.node.key for one in self.tasks)
        self.most |= running
        return task

    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        self.now += seconds
        assert self.now < 1000, "it waits for what will never be"
        for at, happens in [event for event in self.events if event[0] <= self.now]:
            self.events.remove((at, happens))
            happens()
        alive = {node.key for node in self.nodes_now}
        self.tasks = [task for task in self.tasks if task.node.key in alive]
        for task in [task for task in self.tasks if task in tasks]:
            answer = next(task.end, None)
            if answer is not None:
                self.answers[id(task)] = answer
                self.tasks.remove(task)
        return [task for task in tasks if id(task) in self.answers or task in self.looks]

    def answer(self, task: Any) -> Any:
        if task in self.looks:
            self.looks.remove(task)
            failed = self.look_fails.get(task.node.key)
            return {} if failed is None else told_of(failed)
        return self.answers[id(task)]

    def take_back(self, task: Any) -> None:
        self.taken_back.append(task)
        self.tasks.remove(task)

    # as what holds the output

    def show_life(self) -> None:
        pass

    def hear(self, digests: Digests, sent: Mapping[str, str]) -> None:
        self.digests |= digests

    def bytes_of(self, chunks: Iterable[tuple[str, int]]) -> int:
        return CHUNK_BYTES * len(list(chunks))

    # what nodes do

    def journal(self, task: Task) -> Journal:
        made = Journal(self.folder, part_journal(TOKEN, task.name), new=True)
        made.start({"who": task.node.name})
        return made

    def make(self, journal: Journal, numbers: Iterable[int]) -> None:
        chunks = {self.plan.blocks[number].chunk: "digest" for number in numbers}
        journal.add(chunks, read=3 * CHUNK_BYTES * len(journal.digests | chunks))

    def gone(self, key: str) -> None:
        self.nodes_now = [node for node in self.nodes_now if node.key != key]


def works(world: World) -> Behaviour:
    """A node that makes a block each look."""

    def work(task: Task) -> Iterator[Any]:
        journal = world.journal(task)
        for number in task.part:
            world.make(journal, [number])
            yield None
        journal.say(done=True)
        yield {"chunks": len(task.part)}

    return work


def answers(answer: Any, *, after: int = 0) -> Behaviour:
    """Ends so after some looks, and has done nothing."""

    def end(task: Task) -> Iterator[Any]:
        yield from (None for _ in range(after))
        yield answer

    return end


def never(task: Task) -> Iterator[Any]:
    """Does not begin."""
    while True:
        yield None


def failed(error: BaseException) -> dict[str, Any]:
    return told_of(error)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_run(tmp_path_factory.mktemp("run"), steps=3, shapes=SHAPES, dtype="bf16")


@pytest.fixture
def world(tmp_path: Path, paths: list[Path]) -> Iterator[World]:
    with engine.plan(trajectory.from_checkpoints(paths).points) as plan:
        assert [plan.blocks.chunk_of(n) for n in range(9)] == [block.chunk for block in plan.blocks]
        folder = tmp_path / "hidden"
        folder.mkdir()
        made = World(plan=plan, folder=folder, behave=never, nodes_now=[node("a"), node("b")])
        made.behave = works(made)
        yield made


@dataclass
class Shared:
    """What was said while parts were shared out."""

    told: list[str] = field(default_factory=list)
    shown: list[list[NodeProgress]] = field(default_factory=list)
    moved: list[tuple[int, int]] = field(default_factory=list)


def share(world: World, parts: int = 3, stop: StopFlag | None = None, seen: Shared | None = None) -> Shared:
    seen = seen or Shared()
    cluster: Any = world
    assert all(hasattr(Cluster, name) for name in ("nodes", "start", "ended", "answer", "take_back"))
    roster = Roster(
        cluster,
        world.nodes(),
        on=OnRay(node_seconds=60),
        packed=b"",
        tell=seen.told.append,
        clock=lambda: world.now,
    )
    sharing = Sharing(
        world.plan,
        world,
        world.digests,
        cluster,
        roster,
        packed=b"",
        cores=1,
        silent_seconds=30,
        call_off=world.called_off.append,
        progress=lambda read, written: seen.moved.append((read, written)),
        show=lambda nodes: seen.shown.append([NodeProgress(**vars(one)) for one in nodes]),
        tell=seen.told.append,
        clock=lambda: world.now,
    )
    sharing.carry_out(world.plan.partition(parts), stop or StopFlag())
    return seen


def all_done(world: World) -> bool:
    return len(world.digests) == len(world.plan.blocks) and not world.tasks


def test_every_part_is_given_once_and_figures_add_up(world: World) -> None:
    seen = share(world, parts=4)
    assert all_done(world)
    assert sorted(number for task in world.given for number in task.part) == list(range(9))
    assert {task.node.key for task in world.given} == {"a", "b"}
    assert sum(written for _, written in seen.moved) == 9 * CHUNK_BYTES
    assert sum(read for read, _ in seen.moved) == 27 * CHUNK_BYTES
    last = seen.shown[-1]
    assert sum(one.parts_done for one in last) == 4
    assert sum(one.bytes_written for one in last) == 9 * CHUNK_BYTES
    assert sum(one.bytes_read for one in last) == 27 * CHUNK_BYTES
    assert [one.parts_running for one in last] == [0, 0]
    assert all(one.seconds == world.now and not one.lost for one in last)
    assert seen.told == []


def test_a_node_has_as_many_parts_as_it_has_slots(world: World) -> None:
    world.nodes_now = [node("a", 3), node("b", 1)]
    share(world, parts=9)
    assert world.most == {"a": 3, "b": 1}


def test_what_is_done_is_not_given_again(world: World) -> None:
    """A task is lost after two blocks: the rest of its part, alone, goes to a node."""
    lost: list[Task] = []

    def behave(task: Task) -> Iterator[Any]:
        if lost:
            yield from works(world)(task)
        lost.append(task)
        journal = world.journal(task)
        world.make(journal, list(task.part)[:2])
        yield Lost(why="WorkerCrashedError")

    world.behave = behave
    seen = share(world, parts=2)
    assert all_done(world)
    assert sum(len(task.part) for task in world.given) == 9 + len(lost[0].part) - 2
    (line,) = seen.told
    number, _ = lost[0].name.split("-")
    assert line == f"{lost[0].node.name}: part {number} is given to a node again: WorkerCrashedError"
    names = [one.name for one in world.given if one.name.startswith(f"{number}-")]
    assert len(set(names)) == 2


def test_the_largest_part_is_given_first(world: World) -> None:
    share(world, parts=4)
    sizes = [part.bytes_to_read for part in world.plan.partition(4)]
    given = [sizes[int(task.name.split("-")[0])] for task in world.given]
    assert given == sorted(sizes, reverse=True) != sizes


@pytest.mark.parametrize(
    "answer",
    [Lost(why="OutOfMemoryError"), failed(StorageError("the disk")), failed(Interrupted("lost sight"))],
)
def test_a_part_fails_four_times(world: World, answer: Any) -> None:
    world.behave = answers(answer)
    with pytest.raises((StorageError, Interrupted), match=r"part \d failed 4 times, at last on node"):
        share(world, parts=1)
    assert len(world.given) == 4


def test_three_failures_are_mended(world: World) -> None:
    def behave(task: Task) -> Iterator[Any]:
        if len(world.given) < 3:
            yield failed(StorageError("the disk"))
        yield from works(world)(task)

    world.behave = behave
    share(world, parts=1)
    assert all_done(world)


def test_what_was_lost_with_a_node_is_no_failure(world: World) -> None:
    """Two tasks of a part are lost on a node before it is seen to be gone, then three fail elsewhere."""
    world.nodes_now = [node("a", 2)]
    count = Counter[str]()

    def behave(task: Task) -> Iterator[Any]:
        count[task.node.key] += 1
        if task.node.key == "a":
            if count["a"] == 3:
                world.nodes_now = [node("b")]
                yield from never(task)
            yield Lost(why="WorkerCrashedError")
        if count["b"] <= 3:
            yield failed(StorageError("the disk"))
        yield from works(world)(task)

    world.behave = behave
    seen = share(world, parts=1)
    assert all_done(world)
    assert count == {"a": 3, "b": 4}
    assert [(one.name, one.lost) for one in seen.shown[-1]] == [("node a", True), ("node b", False)]


def test_parts_of_a_node_that_goes_are_given_to_others(world: World) -> None:
    def behave(task: Task) -> Iterator[Any]:
        return never(task) if task.node.key == "a" else works(world)(task)

    world.behave = behave
    world.events.append((5.0, lambda: world.gone("a")))
    share(world, parts=4)
    assert all_done(world)
    assert [task.node.key for task in world.given].count("a") == 1


def test_a_node_whose_task_was_lost_rests(world: World) -> None:
    def behave(task: Task) -> Iterator[Any]:
        if task.node.key == "a" and world.now < 5:
            return answers(Lost(why="WorkerCrashedError"))(task)
        return works(world)(task)

    world.behave = behave
    share(world, parts=9)
    at = [task.given_at for task in world.given if task.node.key == "a"]
    assert len(at) == 1 or at[1] - at[0] >= 10


def test_a_task_that_does_not_begin_is_moved(world: World) -> None:
    def behave(task: Task) -> Iterator[Any]:
        return never(task) if task.node.key == "a" else works(world)(task)

    world.behave = behave
    share(world, parts=3)
    assert all_done(world)
    assert [task.node.key for task in world.taken_back] == ["a"]
    assert world.now >= 15


def test_a_task_that_plans_for_long_is_not_taken_back(world: World) -> None:
    """It says that it is there before it plans, and nothing more until it has."""

    def behave(task: Task) -> Iterator[Any]:
        journal = Journal(world.folder, part_journal(TOKEN, task.name), new=True)
        began = world.now
        while world.now < began + 20:
            yield None
        journal.start({"who": task.node.name})
        world.make(journal, task.part)
        journal.say(done=True)
        yield {"chunks": len(task.part)}

    world.behave = behave
    seen = share(world, parts=1)
    assert all_done(world)
    assert (len(world.given), world.taken_back, seen.told) == (1, [], [])


def test_tasks_that_begin_nowhere_wait_and_say_so(world: World) -> None:
    """Both nodes' cores are taken for a minute and a half: nothing fails."""

    def behave(task: Task) -> Iterator[Any]:
        while world.now < 90:
            yield None
        yield from works(world)(task)

    world.behave = behave
    seen = share(world, parts=2)
    assert all_done(world)
    assert world.taken_back == []  # no other node has room
    assert 4 <= sum("waiting for cores" in line for line in seen.told) <= 9


def test_moves_end(world: World) -> None:
    world.nodes_now = [node("a"), node("b"), node("c")]

    def behave(task: Task) -> Iterator[Any]:
        while world.now < 300:
            yield None
        yield from works(world)(task)

    world.behave = behave
    share(world, parts=1)
    assert all_done(world)
    assert len(world.taken_back) == 2


@pytest.mark.parametrize("error", [NonfiniteError("NaN in it"), SpaceError("no room")])
def test_what_no_other_try_mends_is_raised_at_once(world: World, error: PmaError) -> None:
    world.behave = answers(failed(error))
    with pytest.raises(type(error), match=str(error)):
        share(world)
    assert len(world.given) == 2


@pytest.mark.parametrize("error", [MismatchError("other sources"), UsageError("another version")])
def test_a_node_that_sees_something_else_is_left_out(world: World, error: PmaError) -> None:
    def behave(task: Task) -> Iterator[Any]:
        return answers(failed(error))(task) if task.node.key == "a" else works(world)(task)

    world.behave = behave
    seen = share(world, parts=6)
    assert all_done(world)
    assert [task.node.key for task in world.given].count("a") == 1
    assert f"node a is given nothing: {error}" in seen.told


def test_where_all_nodes_are_left_out_it_ends_at_once(world: World) -> None:
    world.behave = answers(failed(UsageError("another version")))
    with pytest.raises(StorageError, match="can go on: another version; another version"):
        share(world)
    assert world.now < 2


def test_a_source_that_changed_for_all_is_an_error(world: World, paths: list[Path]) -> None:
    path = next(paths[0].rglob("*.safetensors"))
    path.touch()
    world.behave = answers(failed(MismatchError("it changed")))
    with pytest.raises(MismatchError, match=path.name):
        share(world)


def test_nodes_that_join_look_first(world: World) -> None:
    world.nodes_now = [node("a")]
    world.look_fails["c"] = StorageError("cannot write there")
    world.events.append((1.0, lambda: world.nodes_now.extend([node("b"), node("c")])))
    seen = share(world, parts=9)
    assert all_done(world)
    assert {task.node.key for task in world.given} == {"a", "b"}
    assert [line for line in seen.told if "node c" in line] == [
        "node c is given nothing: node c: cannot write there"
    ]


def test_all_nodes_go_and_one_comes(world: World) -> None:
    world.events.append((0.5, lambda: world.nodes_now.clear()))
    world.events.append((40.0, lambda: world.nodes_now.append(node("c"))))
    share(world)
    assert all_done(world)
    assert "c" in {task.node.key for task in world.given}


def test_all_nodes_go_and_none_comes(world: World) -> None:
    world.behave = never
    world.events.append((0.5, lambda: world.nodes_now.clear()))
    with pytest.raises(
        StorageError, match="no node of the Ray cluster can go on: all with CPUs to give are gone"
    ):
        share(world)
    assert 60 <= world.now < 70


def test_a_look_takes_its_time_where_nothing_is_awaited() -> None:
    """As while there are no nodes: or this process would look as often as it can."""
    started = time.monotonic()
    assert Cluster(None, OnRay()).ended([], 0.1) == []
    assert time.monotonic() - started >= 0.1


def test_a_journal_that_is_not_seen_is_waited_for(world: World) -> None:
    """A task answers that it is done; its journal comes ten seconds later, as over a network."""

    def behave(task: Task) -> Iterator[Any]:
        def appear() -> None:
            journal = world.journal(task)
            world.make(journal, task.part)
            journal.say(done=True)

        world.events.append((world.now + 10, appear))
        yield {"chunks": len(task.part)}

    world.behave = behave
    share(world)
    assert all_done(world)
    assert len(world.given) == 3


def test_a_journal_that_never_comes_is_a_failure(world: World) -> None:
    world.behave = answers({"chunks": 3})
    with pytest.raises(StorageError, match=r"failed 4 times.*its journal is not seen in"):
        share(world, parts=1)
    assert 120 <= world.now < 130


def hangs_first(world: World, *, until: float) -> Behaviour:
    """The first task makes one block, then its file system hangs for so long; what it answers comes late."""

    def behave(task: Task) -> Iterator[Any]:
        if task is not world.given[0]:
            yield from works(world)(task)
        journal = world.journal(task)
        world.make(journal, [next(iter(task.part))])
        while world.now < until:
            yield None
        journal.say(done=True)
        yield {"chunks": len(task.part)}

    return behave


def test_a_part_that_hangs_is_given_to_another_node(world: World) -> None:
    world.behave = hangs_first(world, until=900)
    seen = share(world)
    hung = world.given[0]
    assert len(world.digests) == 9
    assert 30 <= world.now < 40
    assert world.called_off == [hung.name]
    number, _ = hung.name.split("-")
    line = f"{hung.node.name}: part {number} is given to a node again: no sign of life for 30 s"
    assert seen.told == [line]
    assert sum(task.node.key == hung.node.key for task in world.given) == 1  # it is still taken up
    assert world.tasks == [hung]
    assert world.taken_back == []


def test_a_node_that_wakes_up_is_used_again_and_its_late_answer_not_heard(world: World) -> None:
    world.nodes_now = [node("a")]
    world.behave = hangs_first(world, until=80)
    share(world, parts=2)
    assert all_done(world)
    assert 80 <= world.now < 95
    assert [task.given_at >= 80 for task in world.given] == [False, True, True]
    assert sum(len(task.part) for task in world.given[1:]) == 8  # the block that it had told of is done


def test_nodes_that_all_hang_are_an_error(world: World) -> None:
    def hang(task: Task) -> Iterator[Any]:
        world.journal(task)
        yield from never(task)

    world.behave = hang
    with pytest.raises(StorageError, match=r"can go on: node . shows no sign of life; node . shows"):
        share(world)
    assert 90 <= world.now < 100


def test_parts_that_take_long_live_as_long_as_they_say_so(world: World) -> None:
    """A block takes a minute and a half, and the journal is touched meanwhile."""

    def behave(task: Task) -> Iterator[Any]:
        journal = world.journal(task)
        began = world.now
        while world.now < began + 90:
            os.utime(world.folder / part_journal(TOKEN, task.name), (world.now, world.now))
            yield None
        world.make(journal, task.part)
        journal.say(done=True)
        yield {"chunks": len(task.part)}

    world.behave = behave
    share(world)
    assert all_done(world)
    assert len(world.given) == 3


def test_a_flag_stops_it(world: World) -> None:
    stop = StopFlag()
    world.behave = never
    world.events.append((3.0, stop.set))
    share(world, stop=stop)
    assert world.now < 4
    assert len(world.given) == 2


def test_no_more_parts_than_blocks(world: World) -> None:
    assert part_count(world.plan, {}, 4) == 4
    assert part_count(world.plan, {}, 40) == 9
    done = {world.plan.blocks[number].chunk: "" for number in range(7)}
    assert part_count(world.plan, done, 40) == 2
    assert part_count(world.plan, {world.plan.blocks[n].chunk: "" for n in range(9)}, 4) == 1
