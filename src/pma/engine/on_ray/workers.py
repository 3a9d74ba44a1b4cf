"""Work given to processes that keep what they made, on the nodes of a cluster, and given again where a
process or a node is lost.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pma.cluster import Cluster, Lost, Node, NodeProgress, OnRay
from pma.engine.on_ray.checking import begin_look, wrong_in
from pma.engine.together.words import failure_in, said_by, told_of
from pma.errors import Interrupted, MismatchError, PmaError, StorageError, UsageError

_LOOK_SECONDS = 0.25
_NODES_SECONDS = 1.0
_SHOW_SECONDS = 1.0
_TELL_SECONDS = 10.0
# an item is tried so often where its node lives on
_TRIES = 4
# a node whose process was lost may be going, and Ray not know yet
_REST_SECONDS = 10.0
# a process that did not begin by then waits for cores that others use: another node may have some
_BEGIN_SECONDS = 15.0

Answer = dict[str, Any]
Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Job = Sequence[Item]


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many workers a node has at once, and what each takes of it."""

    workers: int
    cores: float
    gpus: float = 0.0


class Kind(Protocol):
    """What a worker's process holds. Each method gives plain values, or `failed` as `answered` tells it."""

    def alive(self) -> Answer:
        """Anything: that it is there."""

    def take(self, *arguments: Any) -> Answer:
        """Make ready for the items of a job. `read`: bytes that this read."""

    def carry_out(self, item: Any) -> Answer:
        """Do one item of the job that was taken last. `read` as above."""


class Owner(Protocol[Item_contra]):
    """Whose work it is, in the process that drives."""

    def used(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Those that work is given to."""

    def room(self, node: Node) -> Room:
        """What one of them has room for."""

    def arguments(self, job: Job[Item_contra]) -> tuple[Any, ...]:
        """What `take` needs to know of a job, or of what is left of one."""

    def begun(self, item: Item_contra) -> None:
        """Hears what a worker turns to."""

    def heard(self, item: Item_contra, answer: Mapping[str, Any]) -> int:
        """Hears an item's answer, once; returns how many parts it completes, for those who watch."""

    def name(self, item: Item_contra) -> str:
        """What messages call it."""

    def check(self) -> None:
        """Raises MismatchError where this process, too, sees a source changed."""


@dataclass(kw_only=True, eq=False)
class _Worker(Generic[Item]):
    """A process on a node. `asked`: what it was asked for and has not answered, in order; None: not an
    item.
    """

    node: Node
    made: Any
    alive: bool = False
    begun_at: float = field(default_factory=time.monotonic)
    job: deque[Item] = field(default_factory=deque)
    asked: deque[tuple[Any, Item | None]] = field(default_factory=deque)

    @property
    def waits(self) -> bool:
        """For cores that others use."""
        return not self.alive and time.monotonic() - self.begun_at > _BEGIN_SECONDS


class Workers(Generic[Item]):
    """Processes that each hold an object of `kind`, made of `arguments` and the node's name, on nodes that
    looked (`checking`) before: `nodes`. They stay for further work until `end`.

    `show` hears how each node does, `tell` a line of what is unusual.
    """

    def __init__(
        self,
        cluster: Cluster,
        on: OnRay,
        kind: type[Kind],
        *arguments: object,
        nodes: Sequence[Node],
        packed: bytes,
        look_in: str,
        show: Callable[[Sequence[NodeProgress]], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._cluster, self._on, self._kind, self._arguments = cluster, on, kind, arguments
        self._packed, self._look_in = packed, look_in
        self._show, self._tell = show, tell or (lambda line: None)
        self._fit = {node.key for node in nodes}
        self._unfit: dict[str, str] = {}
        self._alive: dict[str, Node] = {node.key: node for node in nodes}
        self._left: deque[deque[Item]] = deque()
        self._workers: list[_Worker[Item]] = []
        self._looks: dict[Any, Node] = {}
        self._failures: Counter[str] = Counter()
        self._rest_until: dict[str, float] = {}
        self._did: dict[str, NodeProgress] = {}
        self._since: dict[str, float] = {}
        self._nodes_at = self._shown_at = self._told_at = self._busy_at = 0.0

    def carry_out(self, jobs: Sequence[Job[Item]], owner: Owner[Item]) -> None:
        """Return when all is done. Raises what cannot be mended, after which only `end` is left."""
        self._left.extend(deque(job) for job in jobs if job)
        self._nodes_at = self._told_at = self._busy_at = time.monotonic()
        while self._left or any(worker.job for worker in self._workers):
            self._look_at_nodes(owner)
            self._begin_workers(owner)
            self._give_out(owner)
            first = [worker.asked[0][0] for worker in self._workers if worker.asked]
            self._hear(self._cluster.ended([*first, *self._looks], _LOOK_SECONDS), owner)
            self._show_all()
        self._show_all(now=True)

    def end(self) -> None:
        """End all processes, whatever they do."""
        self._cluster.end([worker.made for worker in self._workers])
        self._cluster.call_off(list(self._looks), 0.0)
        self._workers.clear()
        self._looks.clear()

    def room(self, owner: Owner[Item]) -> int:
        """How many workers there may be at once now."""
        return sum(owner.room(node).workers for node in self._usable())

    # ---- nodes ----

    def _look_at_nodes(self, owner: Owner[Item]) -> None:
        now = time.monotonic()
        if now - self._nodes_at < _NODES_SECONDS:
            return
        self._nodes_at = now
        self._alive = {node.key: node for node in owner.used(self._cluster.nodes())}
        for worker in [worker for worker in self._workers if worker.node.key not in self._alive]:
            self._lose(worker, "its node is gone", owner, counts=False)
        looked_at = {*self._fit, *self._unfit, *(node.key for node in self._looks.values())}
        for key in self._alive.keys() - looked_at:
            node = self._alive[key]
            self._looks[begin_look(self._cluster, node, self._packed, self._look_in)] = node
        nobody_fits = bool(self._alive) and self._alive.keys() <= self._unfit.keys()
        if self._usable():
            self._busy_at = now
        elif nobody_fits or now - self._busy_at > self._on.node_seconds:
            why = "; ".join(self._unfit.values()) or "all of them are gone"
            raise StorageError(f"no node of the Ray cluster can go on: {why}")

    def _usable(self) -> list[Node]:
        return [node for key, node in self._alive.items() if key in self._fit]

    def _leave_out(self, node: Node, error: PmaError, owner: Owner[Item]) -> None:
        self._fit.discard(node.key)
        self._unfit[node.key] = str(error)
        self._tell(f"{node.name} is given nothing: {error}")
        for worker in [worker for worker in self._workers if worker.node.key == node.key]:
            self._lose(worker, str(error), owner, counts=False)

    # ---- workers ----

    def _begin_workers(self, owner: Owner[Item]) -> None:
        now = time.monotonic()
        busy = sum(bool(worker.job) for worker in self._workers)
        usable = [node for node in self._usable() if self._rest_until.get(node.key, 0.0) <= now]
        while sum(not worker.waits for worker in self._workers) < busy + len(self._left):
            free = [(self._count(node), node) for node in usable or self._usable()]
            free = [(count, node) for count, node in free if count < owner.room(node).workers]
            if not free:
                break
            node = min(free, key=lambda one: one[0])[1]
            room = owner.room(node)
            made = self._cluster.begin(
                node, self._kind, *self._arguments, node.name, cores=room.cores, gpus=room.gpus
            )
            worker = _Worker[Item](node=node, made=made)
            worker.asked.append((self._cluster.ask(made, "alive"), None))
            self._workers.append(worker)
            self._since.setdefault(node.key, now)
        if (
            all(worker.waits for worker in self._workers)
            and self._workers
            and now - self._told_at > _TELL_SECONDS
        ):
            self._told_at = now
            self._tell("waiting for cores: the Ray cluster is busy with something else (`ray status`)")

    def _count(self, node: Node) -> int:
        return sum(worker.node.key == node.key for worker in self._workers)

    def _give_out(self, owner: Owner[Item]) -> None:
        for worker in self._workers:
            if self._left and worker.alive and not worker.job:
                worker.job = self._left.popleft()
                arguments = owner.arguments(tuple(worker.job))
                worker.asked.append((self._cluster.ask(worker.made, "take", *arguments), None))
                for item in worker.job:  # all at once, so that it waits for nobody between two
                    worker.asked.append((self._cluster.ask(worker.made, "carry_out", item), item))

    # ---- what is heard ----

    def _hear(self, ended: Sequence[Any], owner: Owner[Item]) -> None:
        for worker in [worker for worker in self._workers if worker.asked and worker.asked[0][0] in ended]:
            task, item = worker.asked.popleft()
            answer = self._cluster.answer(task)
            if worker in self._workers:  # else its node was left out, and its job given back
                self._judge(worker, item, answer, owner)
        for task in [task for task in self._looks if task in ended]:
            node = self._looks.pop(task)
            found = wrong_in(self._cluster.answer(task), node)
            if found is None:
                self._fit.add(node.key)
            else:
                self._leave_out(node, found, owner)

    def _judge(
        self, worker: _Worker[Item], item: Item | None, answer: Lost | Mapping[str, Any], owner: Owner[Item]
    ) -> None:
        if isinstance(answer, Lost):
            gone = worker.node.key not in {node.key for node in self._cluster.nodes()}
            self._lose(worker, answer.why, owner, counts=not gone)
        elif (failed := failure_in(answer)) is not None:
            self._judge_failure(worker, failed, owner)
        else:
            did = self._of(worker.node)
            did.bytes_read += answer.get("read", 0)
            if item is not None:
                worker.job.popleft()
                did.parts_done += owner.heard(item, answer)
            worker.alive = True
            if worker.job and worker.asked:
                owner.begun(worker.job[0])

    def _judge_failure(self, worker: _Worker[Item], failed: PmaError, owner: Owner[Item]) -> None:
        if isinstance(failed, (MismatchError, UsageError)):
            owner.check()
            self._leave_out(worker.node, failed, owner)
        elif isinstance(failed, (StorageError, Interrupted)):
            self._lose(worker, str(failed), owner, counts=True)
        else:
            raise failed

    def _lose(self, worker: _Worker[Item], why: str, owner: Owner[Item], *, counts: bool) -> None:
        """End a worker and take back what is left of its job, to be given again unless that failed too
        often.
        """
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._cluster.end([worker.made])
        self._rest_until[worker.node.key] = time.monotonic() + _REST_SECONDS
        if not worker.job:
            self._judge_beginning(worker, why, owner, counts=counts)
            return
        name = owner.name(worker.job[0])
        self._failures[name] += counts
        if self._failures[name] >= _TRIES:
            raise StorageError(f"{name} failed {_TRIES} times, at last on {worker.node.name}: {why}")
        self._tell(f"{worker.node.name}: {name} is given to a node again: {why}")
        self._left.appendleft(worker.job)

    def _judge_beginning(self, worker: _Worker[Item], why: str, owner: Owner[Item], *, counts: bool) -> None:
        key = worker.node.key
        self._failures[key] += counts and not worker.alive
        if self._failures[key] >= _TRIES and key in self._fit:
            error = StorageError(f"{worker.node.name} could not begin, {_TRIES} times: {why}")
            self._leave_out(worker.node, error, owner)

    # ---- what is shown ----

    def _of(self, node: Node) -> NodeProgress:
        return self._did.setdefault(node.key, NodeProgress(name=node.name))

    def _show_all(self, *, now: bool = False) -> None:
        time_now = time.monotonic()
        if self._show is None or (time_now - self._shown_at < _SHOW_SECONDS and not now):
            return
        self._shown_at = time_now
        for worker in self._workers:
            self._of(worker.node)
        for key, did in self._did.items():
            did.parts_running = sum(bool(w.job) for w in self._workers if w.node.key == key)
            did.seconds = time_now - self._since[key]
            did.lost = key not in self._alive
        self._show(list(self._did.values()))


def answered(who: str, work: Callable[[], Answer]) -> Answer:
    """On a node: what it gives, or failed with, as plain values: an error need not survive a journey as it
    is. What is wrong with the input is told as one process would, what is wrong with a node with its name.
    """
    try:
        return work()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return told_of(StorageError(f"{who}: {where}{error.strerror or error}"))
    except StorageError as error:
        return told_of(said_by(who, error))
    except PmaError as error:
        return told_of(error)
