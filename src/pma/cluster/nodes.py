"""What is asked of Ray: which nodes there are, tasks and objects on a node of our choice, and what became of
them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pma.errors import UsageError, printable

# a node that declares so much of it has its own budget of parts in flight
IO_RESOURCE = "pma_io"
_NAMED_CHARACTERS = 8


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Where to find Ray, and how many parts a node works on at once.

    `address`: HOST:PORT of a cluster; None for the one that RAY_ADDRESS names or that this machine belongs
    to, else for this machine alone. `per_node`: at most so many parts in flight on a node, unless it declares
    a resource `pma_io`. `node_seconds`: how long to wait for a node to answer, or to come when all went.
    """

    address: str | None = None
    per_node: int = 1
    node_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.per_node < 1:
            raise UsageError(f"--per-node {self.per_node}: at least one part at once is needed")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that lives. `slots`: parts that it may work on at once; `cores`, `gpus`: what it has."""

    key: str
    name: str
    slots: int
    cores: float
    gpus: float = 0.0


@dataclass(kw_only=True)
class NodeProgress:
    """What one node did so far. `seconds`: since it was first given a part."""

    name: str
    parts_done: int = 0
    parts_running: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What became of a task that gave no answer: its process or its node is gone, or it could not run."""

    why: str


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any, on: OnRay) -> None:
        self._ray, self._on = ray, on

    def nodes(self) -> list[Node]:
        """Those that live and have cores to give."""
        alive = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        alive = [node for node in alive if node["Resources"].get(IO_RESOURCE, 1) >= 1]
        times = Counter(node["NodeManagerHostname"] for node in alive)
        return [
            Node(
                key=node["NodeID"],
                name=_name(node, alone=times[node["NodeManagerHostname"]] == 1),
                slots=int(node["Resources"].get(IO_RESOURCE, self._on.per_node)),
                cores=node["Resources"]["CPU"],
                gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in alive
        ]

    def start(self, node: Node, function: Callable[..., Any], *arguments: object, cores: float) -> Any:
        """Have a node call `function`, as soon as it has so many cores to give; returns the task."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self._ray.remote(function).options(
            num_cpus=min(cores, node.cores),
            max_retries=0,  # whoever started it knows what is left to do, and where
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.key, soft=False),
        )
        return task.remote(*arguments)

    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Those that ended, after so many seconds at most, or when one does."""
        if not tasks:
            time.sleep(seconds)
            return []
        found, _ = self._ray.wait(list(tasks), num_returns=1, timeout=seconds)
        if found:
            found, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        return list(found)

    def answer(self, task: Any) -> Any:
        """What an ended task returned, or a `Lost`."""
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return Lost(why=why(error))

    def take_back(self, task: Any) -> None:
        """End a task that has not begun.

        No other: Ray (seen with 2.60) aborts this process, in `TaskManager::CompletePendingTask`, where a
        task is cancelled in the moment in which its answer comes.
        """
        with suppress(self._ray.exceptions.RayError):
            self._ray.cancel(task)

    def begin(self, node: Node, kind: type, *arguments: object, cores: float, gpus: float = 0.0) -> Any:
        """Have a node make an object of `kind`, in a process of its own, as soon as it has so much to give;
        returns what `ask` takes. It stays until `end`, or until this process or its own ends.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        made = self._ray.remote(kind).options(
            num_cpus=cores,
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.key, soft=False),
        )
        return made.remote(*arguments)

    def ask(self, made: Any, method: str, *arguments: object) -> Any:
        """Have what `begin` returned call a method of its object, after all that was asked before; returns
        the task.
        """
        return getattr(made, method).remote(*arguments)

    def end(self, made: Sequence[Any]) -> None:
        """End the processes of what `begin` returned, by force."""
        for one in made:
            with suppress(Exception):  # it ended, or Ray is going
                self._ray.kill(one)

    def keep(self, value: object) -> Any:
        """Keep a value for the nodes, which get it by `kept`."""
        return self._ray.put(value)

    def await_end(self, tasks: Sequence[Any], seconds: float) -> None:
        """Wait some seconds at most for tasks that are about to end. Those that go on are ended by Ray when
        this process leaves the cluster, within a tenth of a second.
        """
        if tasks:
            self._ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)


def kept(reference: Any) -> Any:
    """On a node: the value that `Cluster.keep` gave a reference to."""
    import ray

    return ray.get(reference)


def _name(node: dict[str, Any], *, alone: bool) -> str:
    host = printable(str(node["NodeManagerHostname"]), 80)
    return host if alone else f"{host}/{node['NodeID'][:_NAMED_CHARACTERS]}"


def why(error: BaseException) -> str:
    """The kind of an error of Ray's, and its first line: the rest is traces and advice."""
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, BaseException) else error
    lines = str(told).strip().splitlines() or [""]
    return printable(f"{type(told).__name__}: {lines[0]}" if lines[0] else type(told).__name__, 300)
