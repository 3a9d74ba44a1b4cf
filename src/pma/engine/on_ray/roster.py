"""The nodes of a cluster while they work for us: which live, which have room, how each does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pma.cluster import Cluster, Node, NodeProgress, OnRay
from pma.engine.on_ray.checking import ALL, MERGING, Used, begin_look, wrong_in
from pma.errors import PmaError, StorageError

# work is tried so often where its node lives on
TRIES = 4
# what did not begin by then waits for cores that others use: another node may have some
BEGIN_SECONDS = 15.0
_NODES_SECONDS = 1.0
_TELL_SECONDS = 10.0
# a node whose task was lost may be going, and Ray not know yet
_REST_SECONDS = 10.0

Clock = Callable[[], float]


class Roster:
    """Those that looked at the sources before, `nodes`, and those that join and look later.

    `packed`, `look_in`: as for `begin_look`. `used`: which of the cluster's nodes are to work. `tell`
    hears of nodes that are left out.
    """

    def __init__(
        self,
        cluster: Cluster,
        nodes: Iterable[Node],
        *,
        on: OnRay,
        packed: bytes,
        tell: Callable[[str], None],
        look_in: str = MERGING,
        used: Used = ALL,
        clock: Clock = time.monotonic,
    ) -> None:
        self._cluster, self._on, self._tell, self._clock = cluster, on, tell, clock
        self._packed, self._look_in, self._used = packed, look_in, used
        self._alive = {node.key: node for node in nodes}
        self._fit = set(self._alive)
        self._unfit: dict[str, str] = {}
        self._looks: dict[Any, Node] = {}
        self._silent: dict[Any, Node] = {}
        self._rest_until: dict[str, float] = {}
        self._did: dict[str, NodeProgress] = {}
        self._since: dict[str, float] = {}
        self.resume()

    # ---- which there are ----

    def resume(self) -> None:
        """The nodes have something to do again, and were not looked at meanwhile."""
        self._looked_at = self._usable_at = self._told_at = self._clock()

    def refresh(self) -> None:
        """Now and then, see which nodes live; those that joined are to look first. Raises StorageError where
        none was usable for long.
        """
        now = self._clock()
        if now - self._looked_at < _NODES_SECONDS:
            return
        self._looked_at = now
        self._alive = {node.key: node for node in self._used(self._cluster.nodes())}
        looked = {*self._fit, *self._unfit, *(node.key for node in self._looks.values())}
        for key in self._alive.keys() - looked:
            node = self._alive[key]
            self._looks[begin_look(self._cluster, node, self._packed, self._look_in)] = node
        if self.usable:
            self._usable_at = now
        elif now - self._usable_at > self._on.node_seconds:
            raise self._nobody()

    def check_any_may_come(self) -> None:
        """Raises StorageError where nodes live and every one of them was left out."""
        if self._alive and self._alive.keys() <= self._unfit.keys():
            raise self._nobody()

    def _nobody(self) -> StorageError:
        silent = {node.key: f"{node.name} shows no sign of life" for node in self._silent.values()}
        why = "; ".join([*self._unfit.values(), *silent.values()]) or f"all {self._used.kind} are gone"
        return StorageError(f"no node of the Ray cluster can go on: {why}")

    @property
    def awaited(self) -> list[Any]:
        """Tasks whose end `hear` is to be told."""
        return [*self._looks, *self._silent]

    def hear(self, ended: Sequence[Any]) -> None:
        """Nodes whose looks are among these may be given parts, or are left out."""
        for task in [task for task in self._silent if task in ended]:
            del self._silent[task]
        for task in [task for task in self._looks if task in ended]:
            node = self._looks.pop(task)
            found = wrong_in(self._cluster.answer(task), node)
            if found is None:
                self._fit.add(node.key)
            else:
                self.leave_out(node, found)

    def leave_out(self, node: Node, error: PmaError) -> None:
        """Give it nothing more."""
        self._fit.discard(node.key)
        self._unfit[node.key] = str(error)
        self._tell(f"{node.name} is given nothing: {error}")

    def give_up(self, task: Any, node: Node) -> None:
        """A task shows no sign of life: it takes up room on its node until it ends, if it ever does."""
        self._silent[task] = node

    def lives(self, key: str) -> bool:
        """Whether a node was there when it was last looked."""
        return key in self._alive

    @property
    def usable(self) -> list[Node]:
        """Those that live and looked, and are not taken up by tasks without a sign of life."""
        silent = self._given_up()
        return [node for key, node in self._alive.items() if key in self._fit and silent[key] < node.slots]

    def _given_up(self) -> Counter[str]:
        return Counter(node.key for node in self._silent.values())

    # ---- which has room ----

    def rest(self, node: Node) -> None:
        """Rather give it nothing for a while."""
        self._rest_until[node.key] = self._clock() + _REST_SECONDS

    def free(
        self, running: Counter[str], room: Callable[[Node], int] = lambda node: node.slots
    ) -> Node | None:
        """The node with least to do, if any has `room` for one more than are `running` on it."""
        now, nodes, running = self._clock(), self.usable, running + self._given_up()
        awake = [node for node in nodes if self._rest_until.get(node.key, 0.0) <= now]
        free = [node for node in awake or nodes if running[node.key] < room(node)]
        return min(free, key=lambda node: (running[node.key], -room(node)), default=None)

    def tell_of_waiting(self) -> None:
        """All that was given waits for cores: say so now and then."""
        if self._clock() - self._told_at > _TELL_SECONDS:
            self._told_at = self._clock()
            self._tell("waiting for cores: the Ray cluster is busy with something else (`ray status`)")

    # ---- how each does ----

    def of(self, node: Node) -> NodeProgress:
        """What a node did, from when it was first given something: to be added to."""
        self._since.setdefault(node.key, self._clock())
        return self._did.setdefault(node.key, NodeProgress(name=node.name))

    def shown(self, running: Counter[str]) -> list[NodeProgress]:
        """What each did so far."""
        for key, did in self._did.items():
            did.parts_running = running[key]
            did.seconds = self._clock() - self._since[key]
            did.lost = not self.lives(key)
        return list(self._did.values())
