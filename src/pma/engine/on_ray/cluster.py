"""What is asked of Ray: which nodes there are, tasks on a node of our choice, and what became of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from pma.errors import MissingExtra, StorageError, UsageError, printable

# a node that declares so much of it has its own budget of parts in flight
IO_RESOURCE = "pma_io"
_REACH_SECONDS = 10.0
_LEAST_OBJECT_STORE_BYTES = 80_000_000  # nothing but a few numbers goes through it
_NAMED_CHARACTERS = 8
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    """A node that lives. `slots`: parts that it may work on at once."""

    key: str
    name: str
    slots: int
    cores: float


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

    def __init__(self, ray: Any, on: OnRay, signals: _Signals) -> None:
        self._ray, self._on, self._signals = ray, on, signals

    def nodes(self) -> list[Node]:
        """Those that live and have cores to give."""
        with self._signals.held():
            found = self._ray.nodes()
        alive = [node for node in found if node["Alive"] and node["Resources"].get("CPU")]
        alive = [node for node in alive if node["Resources"].get(IO_RESOURCE, 1) >= 1]
        times = Counter(node["NodeManagerHostname"] for node in alive)
        return [
            Node(
                key=node["NodeID"],
                name=_name(node, alone=times[node["NodeManagerHostname"]] == 1),
                slots=int(node["Resources"].get(IO_RESOURCE, self._on.per_node)),
                cores=node["Resources"]["CPU"],
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
        with self._signals.held():
            return task.remote(*arguments)

    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Those that ended, after so many seconds at most, or when one does."""
        if not tasks:
            return []
        with self._signals.held():
            found, _ = self._ray.wait(list(tasks), num_returns=1, timeout=seconds)
            if found:
                found, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        return list(found)

    def answer(self, task: Any) -> Any:
        """What an ended task returned, or a `Lost`."""
        try:
            with self._signals.held():
                return self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return Lost(why=_why(error))

    def call_off(self, tasks: Sequence[Any], seconds: float) -> None:
        """End tasks: as by Ctrl-C, and after some seconds by force."""
        for force in (False, True):
            for task in tasks:
                with suppress(Exception):  # it ended, or Ray is going
                    self._ray.cancel(task, force=force)
            if not tasks:
                return
            with suppress(Exception):
                _, tasks = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)


class _Signals:
    """Signals that end us, which do not strike amid Ray's own code: some of it ends the process then."""

    def __init__(self) -> None:
        self._inside = self._came = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if not self._inside:
            raise KeyboardInterrupt
        self._came = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the end of the block."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            if self._came:
                self._came = False
                raise KeyboardInterrupt

    @contextmanager
    def taken(self) -> Iterator[None]:
        """In the block, ours; Ray has put its own in their place."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _name(node: dict[str, Any], *, alone: bool) -> str:
    host = printable(str(node["NodeManagerHostname"]), 80)
    return host if alone else f"{host}/{node['NodeID'][:_NAMED_CHARACTERS]}"


def _why(error: BaseException) -> str:
    """The kind of an error of Ray's, and its first line: the rest is traces and advice."""
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, BaseException) else error
    lines = str(told).strip().splitlines() or [""]
    return printable(f"{type(told).__name__}: {lines[0]}" if lines[0] else type(told).__name__, 300)


@contextmanager
def connected(on: OnRay) -> Iterator[Cluster]:
    """The cluster that is meant, for the block. Raises MissingExtra, UsageError where it has another version,
    StorageError where it does not answer.
    """
    # what Ray will do one day with accelerators of tasks that want none does not concern us
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtra("--on ray", "ray", "Ray") from None
    signals = _Signals()
    if ray.is_initialized():  # by whoever called us, who may have more to do
        with signals.taken():
            yield Cluster(ray, on, signals)
        return
    with redirect_stdout(sys.stderr):  # stdout is for results, and Ray would tell there of what was lost
        _connect(ray, on.address or os.environ.get("RAY_ADDRESS"))
        try:
            with signals.taken():
                yield Cluster(ray, on, signals)
        finally:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    if address is not None and address not in ("auto", "local"):
        _check_reachable(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == "local":
        _start(ray, quiet)
        return
    try:
        ray.init(address=address or "auto", **quiet)
    except ConnectionError as error:
        if address is not None:
            raise StorageError(f"no Ray cluster answers at {printable(address)}: {_why(error)}") from None
        _start(ray, quiet)
    except RuntimeError as error:
        if "version mismatch" in str(error).lower():
            told = " ".join(str(error).split())
            raise UsageError(
                f"the Ray cluster at {printable(address or 'auto')} is of another version: "
                f"{printable(told, 400)}. Use the same Ray and Python on every node and here"
            ) from None
        raise StorageError(f"Ray at {printable(address or 'auto')} cannot be used: {_why(error)}") from None
    except ValueError as error:
        raise UsageError(f"--ray-address {printable(address or 'auto')}: {_why(error)}") from None


def _start(ray: Any, quiet: dict[str, Any]) -> None:
    """Ray for this machine alone, which ends with this process and tells nobody of its use."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", include_dashboard=False, object_store_memory=_LEAST_OBJECT_STORE_BYTES, **quiet)


def _check_reachable(address: str) -> None:
    """Raises within seconds where Ray itself would try for a minute."""
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray-address {printable(address)} is a Ray Client's; this process has to be on a node of the "
            "cluster, as it writes the same files: give HOST:PORT as `ray start` showed it"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--ray-address {printable(address)}: expected HOST:PORT, as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise StorageError(
            f"no Ray cluster answers at {printable(address)}: {error.strerror or error}; is it running "
            "(`ray status`), and is this its address?"
        ) from None
