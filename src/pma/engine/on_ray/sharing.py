"""Parts of a merge given to nodes that have room, and again where a task, a process or a node is lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pma.cluster import Cluster, Lost, Node, NodeProgress, OnRay
from pma.engine import provenance
from pma.engine.journal import Followed, part_journal
from pma.engine.on_ray.checking import begin_look, wrong_in
from pma.engine.on_ray.task import carry_out_part
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.stream import Digests, Progress
from pma.engine.together.driver import Held
from pma.engine.together.places import look_anew
from pma.engine.together.words import failure_in
from pma.errors import (
    FormatError,
    Interrupted,
    MismatchError,
    NonfiniteError,
    PmaError,
    SpaceError,
    StorageError,
    UsageError,
)

_LOOK_SECONDS = 0.25
_NODES_SECONDS = 1.0
_SHOW_SECONDS = 1.0
_TELL_SECONDS = 10.0
# a part is tried so often where its node lives on
_TRIES = 4
# a node whose task was lost may be going, and Ray not know yet
_REST_SECONDS = 10.0
# a task that did not begin by then waits for cores that others use: it goes elsewhere, so often
_BEGIN_SECONDS, _MOVES = 15.0, 2
# what no other node and no other try makes better
_FINAL = (NonfiniteError, SpaceError, FormatError)


@dataclass(kw_only=True)
class _Piece:
    """A part, what is left of it, and how it went so far."""

    number: int
    part: Part
    names: int = 0
    failures: int = 0
    moves: int = 0


@dataclass(kw_only=True, eq=False)
class _Try:
    """A piece that was given to a node."""

    piece: _Piece
    node: Node
    task: Any
    journal: Followed
    given_at: float = field(default_factory=time.monotonic)
    answered_at: float | None = None
    read: int = 0

    @property
    def begun(self) -> bool:
        return self.journal.heading is not None


class Sharing:
    """Has `parts` carried out by the nodes of a cluster that all looked at the sources before: `nodes`.

    `done`: chunks that are done, as `held` hears of them. `show` hears how each node does, `tell` a line of
    what is unusual.
    """

    def __init__(
        self,
        plan: Plan,
        held: Held,
        done: Digests,
        cluster: Cluster,
        *,
        on: OnRay,
        packed: bytes,
        nodes: Iterable[Node],
        cores: float,
        silent_seconds: float,
        progress: Progress | None = None,
        show: Callable[[Sequence[NodeProgress]], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._plan, self._held, self._done, self._cluster = plan, held, done, cluster
        self._on, self._packed, self._cores, self._silent_seconds = on, packed, cores, silent_seconds
        self._progress, self._show, self._tell = progress, show, tell or (lambda line: None)
        self._fit = {node.key for node in nodes}
        self._unfit: dict[str, str] = {}
        self._alive: dict[str, Node] = {node.key: node for node in nodes}
        self._left: deque[_Piece] = deque()
        self._tries: list[_Try] = []
        self._looks: dict[Any, Node] = {}
        self._rest_until: dict[str, float] = {}
        self._did: dict[str, NodeProgress] = {}
        self._since: dict[str, float] = {}
        self._nodes_at = self._shown_at = self._told_at = self._busy_at = time.monotonic()

    def carry_out(self, parts: Sequence[Part], stop: StopFlag) -> None:
        """Return when all parts are done, or soon where `stop` is set. Raises what cannot be mended."""
        self._left.extend(_Piece(number=number, part=part) for number, part in enumerate(parts))
        while (self._left or self._tries) and not stop.is_set():
            self._look_at_nodes()
            self._give_out()
            ended = self._cluster.ended([*self._unanswered(), *self._looks], _LOOK_SECONDS)
            self._hear(ended)
            self._show_all()
        self._show_all(now=True)

    def _unanswered(self) -> list[Any]:
        return [one.task for one in self._tries if one.answered_at is None]

    # ---- nodes ----

    def _look_at_nodes(self) -> None:
        now = time.monotonic()
        if now - self._nodes_at < _NODES_SECONDS:
            return
        self._nodes_at = now
        self._alive = {node.key: node for node in self._cluster.nodes()}
        for one in [one for one in self._tries if one.node.key not in self._alive]:
            self._lose(one, "its node is gone", counts=False)
        looked_at = {*self._fit, *self._unfit, *(node.key for node in self._looks.values())}
        for key in self._alive.keys() - looked_at:
            node = self._alive[key]
            self._looks[begin_look(self._cluster, node, self._packed)] = node
        if self._usable():
            self._busy_at = now
        elif now - self._busy_at > self._on.node_seconds:
            why = "; ".join(self._unfit.values()) or "all of them are gone"
            raise StorageError(f"no node of the Ray cluster can go on: {why}")

    def _usable(self) -> list[Node]:
        return [node for key, node in self._alive.items() if key in self._fit]

    def _free(self) -> Node | None:
        """The node with least to do, if any has room for a part."""
        now, nodes = time.monotonic(), self._usable()
        awake = [node for node in nodes if self._rest_until.get(node.key, 0.0) <= now]
        room = [(self._running(node), node) for node in awake or nodes]
        room = [(running, node) for running, node in room if running < node.slots]
        return min(room, key=lambda one: (one[0], -one[1].slots), default=(0, None))[1]

    def _running(self, node: Node) -> int:
        return sum(one.node.key == node.key for one in self._tries)

    def _leave_out(self, node: Node, error: PmaError) -> None:
        self._fit.discard(node.key)
        self._unfit[node.key] = str(error)
        self._tell(f"{node.name} is given nothing: {error}")

    # ---- parts ----

    def _give_out(self) -> None:
        while self._left and (node := self._free()) is not None:
            piece = self._left.popleft()
            piece.part = self._rest_of(piece.part)
            if not len(piece.part):
                continue
            name = f"{piece.number}-{piece.names}"
            piece.names += 1
            arguments = (self._packed, piece.part, name, node.name)
            task = self._cluster.start(node, carry_out_part, *arguments, cores=self._cores)
            journal = Followed(self._held.folder / part_journal(self._held.token, name))
            self._tries.append(_Try(piece=piece, node=node, task=task, journal=journal))
            self._since.setdefault(node.key, time.monotonic())
        self._move_what_waits()

    def _rest_of(self, part: Part) -> Part:
        """What of a part is not done."""
        blocks = self._plan.blocks
        numbers = [number for number in part if blocks[number].chunk not in self._done]
        cuts = [0, *(at for at in range(1, len(numbers)) if numbers[at] != numbers[at - 1] + 1), len(numbers)]
        ranges = tuple(range(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(cuts) if b > a)
        return Part(ranges=ranges, bytes_to_read=0, bytes_to_write=0)

    def _move_what_waits(self) -> None:
        now = time.monotonic()
        waiting = [
            one
            for one in self._tries
            if not one.begun and one.answered_at is None and now - one.given_at > _BEGIN_SECONDS
        ]
        for one in waiting:
            node = self._free()
            if self._left or node is None or node.key == one.node.key or one.piece.moves >= _MOVES:
                break
            self._cluster.take_back(one.task)
            one.piece.moves += 1
            self._lose(one, f"{one.node.name} has no cores free for it", counts=False)
        if waiting and len(waiting) == len(self._tries) and now - self._told_at > _TELL_SECONDS:
            self._told_at = now
            self._tell("waiting for cores: the Ray cluster is busy with something else (`ray status`)")

    # ---- what is heard ----

    def _hear(self, ended: Sequence[Any]) -> None:
        look_anew(self._held.folder)
        for one in list(self._tries):
            answer = self._cluster.answer(one.task) if one.task in ended else None
            self._take_news(one)  # after the answer: by then all is journaled
            if answer is not None:
                one.answered_at = time.monotonic()
                self._judge(one, answer)
            elif one.answered_at is not None:
                self._judge(one, {})
        for task in [task for task in self._looks if task in ended]:
            node = self._looks.pop(task)
            found = wrong_in(self._cluster.answer(task), node)
            if found is None:
                self._fit.add(node.key)
            else:
                self._leave_out(node, found)

    def _take_news(self, one: _Try) -> None:
        chunks = one.journal.news()
        said = one.journal.said
        new = {chunk: digest for chunk, digest in chunks.items() if chunk not in self._done}
        self._held.hear(chunks, said.get("sent", {}))
        if not chunks:
            return
        read, one.read = said.get("read", 0) - one.read, said.get("read", 0)
        written = self._held.bytes_of(new)
        did = self._of(one.node)
        did.bytes_read += read
        did.bytes_written += written
        if self._progress is not None:
            self._progress(read, written)

    def _judge(self, one: _Try, answer: Lost | Mapping[str, Any]) -> None:
        if isinstance(answer, Lost):
            gone = one.node.key not in {node.key for node in self._cluster.nodes()}
            self._lose(one, answer.why, counts=not gone)
            return
        failed = failure_in(answer)
        if failed is not None:
            self._judge_failure(one, failed)
        elif one.journal.said.get("done"):
            self._tries.remove(one)
            self._of(one.node).parts_done += 1
        elif one.answered_at is not None and time.monotonic() - one.answered_at > self._silent_seconds:
            self._lose(one, f"its journal is not seen in {self._held.folder}", counts=True)

    def _judge_failure(self, one: _Try, failed: PmaError) -> None:
        if isinstance(failed, _FINAL):
            raise failed
        if isinstance(failed, (MismatchError, UsageError)):
            provenance.check_unchanged(self._plan)  # raises where all see the change
            self._leave_out(one.node, failed)
            self._lose(one, str(failed), counts=False)
            return
        if isinstance(failed, Interrupted):  # a process that lost sight of us; we may have been told to stop
            self._held.show_life()
        self._lose(one, str(failed), counts=True, kind=type(failed))

    def _lose(self, one: _Try, why: str, *, counts: bool, kind: type[PmaError] = StorageError) -> None:
        """Take a piece back, and give it again, unless that failed too often."""
        if one not in self._tries:
            return
        self._take_news(one)
        self._tries.remove(one)
        piece = one.piece
        self._rest_until[one.node.key] = time.monotonic() + _REST_SECONDS
        piece.failures += counts
        if piece.failures >= _TRIES:
            raise kind(
                f"part {piece.number} failed {piece.failures} times, at last on {one.node.name}: {why}"
            )
        if one.begun or counts:
            self._tell(f"{one.node.name}: part {piece.number} is given to a node again: {why}")
        self._left.appendleft(piece)

    # ---- what is shown ----

    def _of(self, node: Node) -> NodeProgress:
        return self._did.setdefault(node.key, NodeProgress(name=node.name))

    def _show_all(self, *, now: bool = False) -> None:
        time_now = time.monotonic()
        if self._show is None or (time_now - self._shown_at < _SHOW_SECONDS and not now):
            return
        self._shown_at = time_now
        for one in self._tries:
            self._of(one.node)
        for key, did in self._did.items():
            did.parts_running = sum(one.node.key == key for one in self._tries)
            did.seconds = time_now - self._since[key]
            did.lost = key not in self._alive
        self._show(list(self._did.values()))


def part_count(plan: Plan, done: Digests, wanted: int) -> int:
    """How many parts to cut, where so many are wanted: no more than there are blocks to make."""
    return max(1, min(len(plan.blocks) - len(done), wanted))
