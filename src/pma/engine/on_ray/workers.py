"""Work given to processes that keep what they made, on the nodes of a cluster, and given again where a
process or a node is lost.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pma.cluster import Cluster, Lost, Node, NodeProgress
from pma.engine.on_ray.answers import Answer
from pma.engine.on_ray.roster import BEGIN_SECONDS, TRIES, Roster
from pma.engine.together.words import failure_in
from pma.errors import Interrupted, MismatchError, PmaError, StorageError, UsageError

_LOOK_SECONDS = 0.25
_SHOW_SECONDS = 1.0

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
        return not self.alive and time.monotonic() - self.begun_at > BEGIN_SECONDS


class Workers(Generic[Item]):
    """Processes that each hold an object of `kind`, made of `arguments` and the node's name, on the nodes of
    a roster. They stay for further work until `end`.

    `show` hears how each node does, `tell` a line of what is unusual.
    """

    def __init__(
        self,
        cluster: Cluster,
        roster: Roster,
        kind: type[Kind],
        *arguments: object,
        show: Callable[[Sequence[NodeProgress]], None] | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._cluster, self._roster, self._kind, self._arguments = cluster, roster, kind, arguments
        self._show, self._tell = show, tell
        self._left: deque[deque[Item]] = deque()
        self._workers: list[_Worker[Item]] = []
        self._failures: Counter[str] = Counter()
        self._shown_at = 0.0

    def carry_out(self, jobs: Sequence[Job[Item]], owner: Owner[Item]) -> None:
        """Return when all is done. Raises what cannot be mended, after which only `end` is left."""
        self._left.extend(deque(job) for job in jobs if job)
        self._roster.resume()
        while self._left or any(worker.job for worker in self._workers):
            self._look_at_nodes(owner)
            self._begin_workers(owner)
            self._give_out(owner)
            first = [worker.asked[0][0] for worker in self._workers if worker.asked]
            ended = self._cluster.ended([*first, *self._roster.awaited], _LOOK_SECONDS)
            self._hear(ended, owner)
            self._roster.hear(ended)
            self._show_all()
        self._show_all(now=True)

    def end(self) -> None:
        """End all processes, whatever they do."""
        self._cluster.end([worker.made for worker in self._workers])
        self._workers.clear()

    def room(self, owner: Owner[Item]) -> int:
        """How many workers there may be at once now."""
        return sum(owner.room(node).workers for node in self._roster.usable)

    def _look_at_nodes(self, owner: Owner[Item]) -> None:
        self._roster.refresh()
        for worker in [worker for worker in self._workers if not self._roster.lives(worker.node.key)]:
            self._lose(worker, "its node is gone", owner, counts=False)
        self._roster.check_any_may_come()

    def _leave_out(self, node: Node, error: PmaError, owner: Owner[Item]) -> None:
        self._roster.leave_out(node, error)
        for worker in [worker for worker in self._workers if worker.node.key == node.key]:
            self._lose(worker, str(error), owner, counts=False)

    # ---- workers ----

    def _begin_workers(self, owner: Owner[Item]) -> None:
        busy = sum(bool(worker.job) for worker in self._workers)
        while sum(not worker.waits for worker in self._workers) < busy + len(self._left):
            begun = Counter(worker.node.key for worker in self._workers)
            node = self._roster.free(begun, lambda node: owner.room(node).workers)
            if node is None:
                break
            room = owner.room(node)
            made = self._cluster.begin(
                node, self._kind, *self._arguments, node.name, cores=room.cores, gpus=room.gpus
            )
            worker = _Worker[Item](node=node, made=made)
            worker.asked.append((self._cluster.ask(made, "alive"), None))
            self._workers.append(worker)
            self._roster.of(node)
        if self._workers and all(worker.waits for worker in self._workers):
            self._roster.tell_of_waiting()

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

    def _judge(
        self, worker: _Worker[Item], item: Item | None, answer: Lost | Mapping[str, Any], owner: Owner[Item]
    ) -> None:
        if isinstance(answer, Lost):
            gone = worker.node.key not in {node.key for node in self._cluster.nodes()}
            self._lose(worker, answer.why, owner, counts=not gone)
        elif (failed := failure_in(answer)) is not None:
            self._judge_failure(worker, failed, owner)
        else:
            did = self._roster.of(worker.node)
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
        self._roster.rest(worker.node)
        if not worker.job:
            self._judge_beginning(worker, why, owner, counts=counts)
            return
        name = owner.name(worker.job[0])
        self._failures[name] += counts
        if self._failures[name] >= TRIES:
            raise StorageError(f"{name} failed {TRIES} times, at last on {worker.node.name}: {why}")
        self._tell(f"{worker.node.name}: {name} is given to a node again: {why}")
        self._left.appendleft(worker.job)

    def _judge_beginning(self, worker: _Worker[Item], why: str, owner: Owner[Item], *, counts: bool) -> None:
        key = worker.node.key
        self._failures[key] += counts and not worker.alive
        if self._failures[key] >= TRIES and worker.node in self._roster.usable:
            error = StorageError(f"{worker.node.name} could not begin, {TRIES} times: {why}")
            self._leave_out(worker.node, error, owner)

    # ---- what is shown ----

    def _show_all(self, *, now: bool = False) -> None:
        time_now = time.monotonic()
        if self._show is None or (time_now - self._shown_at < _SHOW_SECONDS and not now):
            return
        self._shown_at = time_now
        self._show(self._roster.shown(Counter(worker.node.key for worker in self._workers if worker.job)))
