"""Before the first byte: every node sees the same sources and can write where the output is built."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from pma.cluster import Cluster, Lost, Node
from pma.engine.together.words import failure_in, said_by
from pma.errors import PmaError, StorageError, UsageError

_DISTRIBUTION = "pma-llm"
_LOOK_SECONDS = 0.5
_NAMED = 8
# the module whose `look` is for merges
MERGING = "pma.engine.on_ray.task"


def _probe() -> Callable[[bytes, str, str, str], dict[str, Any]]:
    # made in here it travels as code, not by name: it has to run where this package is not
    def probe(packed: bytes, who: str, ours: str, module: str) -> dict[str, Any]:
        import sys
        from importlib import import_module
        from importlib.metadata import PackageNotFoundError, version

        def refused(message: str) -> dict[str, Any]:
            return {"failed": {"kind": "UsageError", "message": f"{who}: {message}"}}

        try:
            theirs = version("pma-llm")
            if theirs != ours:
                return refused(f"pma-llm {theirs}, and {ours} here; install the same on every node")
            look = import_module(module).look
        except (ImportError, PackageNotFoundError) as error:
            return refused(
                f"pma-llm cannot be imported by {sys.executable}: {error}; install it on every node"
            )
        answer: dict[str, Any] = look(packed, who)
        return answer

    return probe


class Used(Protocol):
    """Which of a cluster's nodes are to work; `kind` tells them from others, in words."""

    @property
    def kind(self) -> str: ...
    def __call__(self, nodes: Sequence[Node]) -> Sequence[Node]: ...


class AllOf:
    """Every node is used."""

    kind = "with CPUs to give"

    def __call__(self, nodes: Sequence[Node]) -> Sequence[Node]:
        return nodes


ALL = AllOf()


def begin_look(cluster: Cluster, node: Node, packed: bytes, look_in: str = MERGING) -> Any:
    """Have a node look, by `look(packed, its name)` of the module `look_in`; returns the task."""
    return cluster.start(node, _probe(), packed, node.name, version(_DISTRIBUTION), look_in, cores=0)


def wrong_in(answer: Any, node: Node) -> PmaError | None:
    """What a look found wrong, naming the node; None where all is well."""
    if isinstance(answer, Lost):
        return StorageError(f"{node.name} could not look at the sources: {answer.why}")
    failed = failure_in(answer)
    return None if failed is None else said_by(node.name, failed)


def check_all(
    cluster: Cluster,
    packed: bytes,
    seconds: float,
    look_in: str = MERGING,
    *,
    used: Used = ALL,
) -> list[Node]:
    """Have all nodes that are `used` look, as by `begin_look`; returns those that live on. Raises what the
    first one found wrong, StorageError where one does not answer.
    """
    nodes = {node.key: node for node in used(cluster.nodes())}
    waiting = {begin_look(cluster, node, packed, look_in): node for node in nodes.values()}
    started = time.monotonic()
    try:
        while waiting:
            ended = [(waiting.pop(t), cluster.answer(t)) for t in cluster.ended(list(waiting), _LOOK_SECONDS)]
            alive = {node.key for node in cluster.nodes()}
            for gone in nodes.keys() - alive:
                del nodes[gone]
            waiting = {task: node for task, node in waiting.items() if node.key in nodes}
            for node, answer in ended:
                found = wrong_in(answer, node)
                if found is not None and node.key in nodes:
                    raise type(found)(f"{found}. Nothing was written")
            if waiting and time.monotonic() - started > seconds:
                names = ", ".join(node.name for node in list(waiting.values())[:_NAMED])
                raise StorageError(f"{names} did not answer within {seconds:.0f} s; nothing was written")
    finally:
        cluster.await_end(list(waiting), 1.0)
    if not nodes:
        raise UsageError(f"the Ray cluster has no node {used.kind} (`ray status`)")
    return list(nodes.values())
