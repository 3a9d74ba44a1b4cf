"""Parts of a merge given to nodes that have room, and again where a task, a process or a node is lost."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pma.cluster import Cluster, Lost, Node, NodeProgress
from pma.engine import provenance
from pma.engine.journal import Followed, part_journal
from pma.engine.on_ray.roster import BEGIN_SECONDS, TRIES, Clock, Roster
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
from pma.remote import RemotePath

# to look into a store is a request each time
_LOOK_SECONDS, _STORE_LOOK_SECONDS = 0.25, 1.0
_SHOW_SECONDS = 1.0
# a task that waits for cores goes elsewhere, so often
_MOVES = 2
# what no other node and no other try makes better
_FINAL = (NonfiniteError, SpaceError, FormatError)


@dataclass(kw_only=True)
class _Piece:
    """A part, what is left of it, and how it went so far. `lost_on`: nodes where a task of it was lost."""

    number: int
    part: Part
    names: int = 0
    failures: int = 0
    lost_on: list[str] = field(default_factory=list)
    moves: int = 0


@dataclass(kw_only=True, eq=False)
class _Try:
    """A piece that was given to a node. `alive_at`: when its journal was last found changed, which whoever
    carries it out touches every few seconds.
    """

    piece: _Piece
    name: str
    node: Node
    task: Any
    journal: Followed
    given_at: float
    alive_at: float
    changes: int = 0
    answered_at: float | None = None
    read: int = 0

    @property
    def begun(self) -> bool:
        return self.journal.changes > 0  # it is there, be it without a word yet


class Sharing:
    """Has parts carried out by the nodes of a cluster.

    `done`: chunks that are done, as `held` hears of them. `packed`: what a node needs to carry out a part, on
    so many `cores`. One that shows no sign of life for `silent_seconds` is given up, and `call_off` tells it
    so, by its name. `show` hears how each node does, `tell` a line of what is unusual.
    """

    def __init__(
        self,
        plan: Plan,
        held: Held,
        done: Digests,
        cluster: Cluster,
        roster: Roster,
        *,
        packed: bytes,
        cores: float,
        silent_seconds: float,
        call_off: Callable[[str], None],
        progress: Progress | None = None,
        show: Callable[[Sequence[NodeProgress]], None] | None = None,
        tell: Callable[[str], None] = lambda line: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._plan, self._held, self._done, self._cluster, self._roster = plan, held, done, cluster, roster
        self._packed, self._cores = packed, cores
        self._silent_seconds, self._call_off = silent_seconds, call_off
        self._progress, self._show, self._tell, self._clock = progress, show, tell, clock
        self._left: deque[_Piece] = deque()
        self._tries: list[_Try] = []
        self._shown_at = clock()

    def carry_out(self, parts: Sequence[Part], stop: StopFlag) -> None:
        """Return when all parts are done, or soon where `stop` is set. Raises what cannot be mended."""
        pieces = [_Piece(number=number, part=part) for number, part in enumerate(parts)]
        # the largest first: what is left at the end, when some have nothing to do any more, is small
        self._left.extend(sorted(pieces, key=lambda piece: -piece.part.bytes_to_read))
        pause = _STORE_LOOK_SECONDS if isinstance(self._held.folder, RemotePath) else _LOOK_SECONDS
        while (self._left or self._tries) and not stop.is_set():
            self._roster.refresh()
            for one in [one for one in self._tries if not self._roster.lives(one.node.key)]:
                self._lose(one, "its node is gone")
            if not self._tries:
                self._roster.check_any_may_come()
            self._give_out()
            ended = self._cluster.ended([*self._unanswered(), *self._roster.awaited], pause)
            self._hear(ended)
            self._roster.hear(ended)
            self._show_all()
        self._show_all(now=True)

    def await_end(self, seconds: float) -> None:
        """After a failure of which those who carry out parts were told: wait so long at most until they
        stop.
        """
        self._cluster.await_end(self._unanswered(), seconds)

    def _unanswered(self) -> list[Any]:
        return [one.task for one in self._tries if one.answered_at is None]

    # ---- what is given ----

    def _give_out(self) -> None:
        while self._left and (node := self._roster.free(self._running())) is not None:
            piece = self._left.popleft()
            piece.part = self._rest_of(piece.part)
            if not len(piece.part):
                continue
            name = f"{piece.number}-{piece.names}"
            piece.names += 1
            arguments = (self._packed, piece.part, name, node.name)
            task = self._cluster.start(node, carry_out_part, *arguments, cores=self._cores)
            journal = Followed(self._held.folder / part_journal(self._held.token, name))
            now = self._clock()
            given = _Try(
                piece=piece, name=name, node=node, task=task, journal=journal, given_at=now, alive_at=now
            )
            self._tries.append(given)
            self._roster.of(node)
        self._move_what_waits()

    def _rest_of(self, part: Part) -> Part:
        """What of a part is not done."""
        blocks = self._plan.blocks
        numbers = [number for number in part if blocks.chunk_of(number) not in self._done]
        cuts = [0, *(at for at in range(1, len(numbers)) if numbers[at] != numbers[at - 1] + 1), len(numbers)]
        ranges = tuple(range(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(cuts) if b > a)
        return Part(ranges=ranges, bytes_to_read=0, bytes_to_write=0)

    def _running(self) -> Counter[str]:
        return Counter(one.node.key for one in self._tries)

    def _move_what_waits(self) -> None:
        now = self._clock()
        waiting = [
            one
            for one in self._tries
            if not one.begun and one.answered_at is None and now - one.given_at > BEGIN_SECONDS
        ]
        for one in waiting:
            node = self._roster.free(self._running())
            if self._left or node is None or node.key == one.node.key or one.piece.moves >= _MOVES:
                break
            self._cluster.take_back(one.task)
            one.piece.moves += 1
            self._lose(one, f"{one.node.name} has no cores free for it")
        if waiting and len(waiting) == len(self._tries):
            self._roster.tell_of_waiting()

    # ---- what is heard, and taken back ----

    def _hear(self, ended: Sequence[Any]) -> None:
        look_anew(self._held.folder)
        for one in list(self._tries):
            answer = self._cluster.answer(one.task) if one.task in ended else None
            self._take_news(one)  # after the answer: by then all is journaled
            if answer is not None:
                one.answered_at = self._clock()
                self._judge(one, answer)
            elif one.answered_at is not None:
                self._judge(one, {})
            elif one.begun and self._clock() - one.alive_at > self._silent_seconds:
                self._give_up(one)

    def _take_news(self, one: _Try) -> None:
        chunks = one.journal.news()
        if one.journal.changes != one.changes:
            one.changes, one.alive_at = one.journal.changes, self._clock()
        said = one.journal.said
        new = {chunk: digest for chunk, digest in chunks.items() if chunk not in self._done}
        self._held.hear(chunks, said.get("sent", {}))
        if not chunks:
            return
        read, one.read = said.get("read", 0) - one.read, said.get("read", 0)
        written = self._held.bytes_of(new)
        did = self._roster.of(one.node)
        did.bytes_read += read
        did.bytes_written += written
        if self._progress is not None:
            self._progress(read, written)

    def _judge(self, one: _Try, answer: Lost | Mapping[str, Any]) -> None:
        if isinstance(answer, Lost):
            one.piece.lost_on.append(one.node.key)
            self._lose(one, answer.why)
            return
        failed = failure_in(answer)
        if failed is not None:
            self._judge_failure(one, failed)
        elif one.journal.said.get("done"):
            self._tries.remove(one)
            self._roster.of(one.node).parts_done += 1
        elif one.answered_at is not None and self._clock() - one.answered_at > self._silent_seconds:
            one.piece.failures += 1
            self._lose(one, f"its journal is not seen in {self._held.folder}")

    def _judge_failure(self, one: _Try, failed: PmaError) -> None:
        if isinstance(failed, _FINAL):
            raise failed
        if isinstance(failed, (MismatchError, UsageError)):
            provenance.check_unchanged(self._plan)  # raises where all see the change
            self._roster.leave_out(one.node, failed)
            self._lose(one, str(failed))
            return
        if isinstance(failed, Interrupted):  # a process that lost sight of us; we may have been told to stop
            self._held.show_life()
        one.piece.failures += 1
        self._lose(one, str(failed), kind=type(failed))

    def _give_up(self, one: _Try) -> None:
        """Where a node's file system hangs, Ray sees nothing of it. What the task answers, should it wake up,
        is not heard.
        """
        self._call_off(one.name)
        self._roster.give_up(one.task, one.node)
        one.piece.failures += 1
        self._lose(one, f"no sign of life for {self._silent_seconds:.0f} s")

    def _lose(self, one: _Try, why: str, *, kind: type[PmaError] = StorageError) -> None:
        """Take a piece back, and give it again, unless that failed too often."""
        self._take_news(one)
        self._tries.remove(one)
        self._roster.rest(one.node)
        piece = one.piece
        # Ray may see only later that a node is gone: what was lost there counts until then
        failures = piece.failures + sum(map(self._roster.lives, piece.lost_on))
        if failures >= TRIES:
            raise kind(f"part {piece.number} failed {failures} times, at last on {one.node.name}: {why}")
        if one.begun or one.answered_at is not None:
            self._tell(f"{one.node.name}: part {piece.number} is given to a node again: {why}")
        self._left.appendleft(piece)

    # ---- what is shown ----

    def _show_all(self, *, now: bool = False) -> None:
        if self._show is None or (self._clock() - self._shown_at < _SHOW_SECONDS and not now):
            return
        self._shown_at = self._clock()
        self._show(self._roster.shown(self._running()))


def part_count(plan: Plan, done: Digests, wanted: int) -> int:
    """How many parts to cut, where so many are wanted: no more than there are blocks to make."""
    return max(1, min(len(plan.blocks) - len(done), wanted))
