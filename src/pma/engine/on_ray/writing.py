"""A merge whose parts the nodes of a Ray cluster carry out; this process alone begins and commits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Unpack

from pma.cluster import Cluster, Node, OnRay, connected
from pma.engine.attempt import attempt
from pma.engine.building import SAVE_SECONDS, Building, kept_up
from pma.engine.commit import Count, How, Merge, check_output
from pma.engine.lease import host
from pma.engine.on_ray.checking import check_all
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.sharing import Sharing, part_count
from pma.engine.on_ray.task import Spec, portable
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.together.crew import Crew
from pma.engine.together.driver import Driver
from pma.engine.together.writing import Beating, commit
from pma.errors import UsageError
from pma.remote import RemotePath

_PARTS_PER_SLOT = 4


def write(plan: Plan, out: Path, on: OnRay, **how: Unpack[How]) -> Merge:
    """As `engine.write`, to the bit, by the nodes of a Ray cluster.

    Raises UsageError or StorageError for a cluster that cannot be used, MismatchError where a node sees other
    sources, StorageError where it cannot write; Interrupted where the merge was called off. What is done is
    kept.
    """
    if isinstance(out, RemotePath):
        raise UsageError(
            f"--on ray writes to a file system that all nodes see, and {out} is in a store; torchrun and "
            "srun write there"
        )
    started = time.monotonic()
    warnings = check_output(plan, out, inside_run=how.get("inside_run", False))
    count = Count(how.get("progress"))
    with connected(on) as cluster:
        resumed, seconds = _led(plan, out, cluster, on, count, how)
    return Merge(
        path=out,
        checkpoints=len(plan.sources),
        scheme=plan.options.scheme_text,
        bytes_read=count.read,
        bytes_written=plan.bytes_to_write - resumed,
        bytes_resumed=resumed,
        seconds=time.monotonic() - started,
        stream_seconds=seconds,
        durable_seconds=seconds,
        warnings=warnings,
    )


def _led(plan: Plan, out: Path, cluster: Cluster, on: OnRay, count: Count, how: How) -> tuple[int, float]:
    """Bytes that were there, and how long the others took."""
    met = _Met(plan, out, cluster, on, how)
    save_seconds = how.get("save_seconds", SAVE_SECONDS)
    fresh, break_lock = how.get("fresh", False), how.get("break_lock", False)
    with (
        closing(met.driver),
        attempt(plan, out, fresh=fresh, break_lock=break_lock, agree=met.meet) as building,
        met.driver.telling(),  # before what is told of goes
    ):
        resumed, streaming, stop = building.bytes_done, time.monotonic(), StopFlag()
        if resumed:
            count.add(0, resumed)
        parts = plan.partition(met.part_count(building), done=building.output.digests)
        with kept_up([building], stop, save_seconds):
            met.sharing(building, count).carry_out(parts, stop)
        building.save()
        seconds = time.monotonic() - streaming
        sha256, hash_sources = how.get("sha256", False), how.get("hash_sources", False)
        with kept_up([Beating(building)], StopFlag(), save_seconds):  # to hash all again may take long
            commit(building, sha256=sha256, hash_sources=hash_sources)
    return resumed, seconds


class _Met:
    """The nodes of a cluster, met under the lease of an output."""

    def __init__(self, plan: Plan, out: Path, cluster: Cluster, on: OnRay, how: How) -> None:
        self._plan, self._out, self._cluster, self._on, self._how = plan, out, cluster, on, how
        who = f"the driver on {host()}"
        self.driver = Driver(plan, [], Crew(rank=0, size=1), who=who)
        self._nodes: list[Node] = []
        self._packed = b""

    def meet(self, building: Building) -> None:
        """Have every node look at the sources and write where the output is built. Raises what is wrong."""
        self.driver.meet(building)
        points, options = portable(self._plan)
        self._packed = Spec(
            points=points,
            options=options,
            as_given=self._plan.as_given,
            files=len(self._plan.layout.files),
            out=self._out.absolute(),
            token=building.token,
            staging=self._how.get("staging"),
            save_seconds=self._how.get("save_seconds", SAVE_SECONDS),
            silent_seconds=Crew.silent_seconds,
        ).packed()
        with self.driver.telling(), _beating(building):
            self._nodes = check_all(self._cluster, self._packed, self._on.node_seconds)

    def part_count(self, building: Building) -> int:
        """How many parts to cut."""
        done, slots = building.output.digests, sum(node.slots for node in self._nodes)
        parts = part_count(self._plan, done, _PARTS_PER_SLOT * slots)
        if (tell := self._how.get("tell")) is not None and parts < slots:
            tell(f"{slots} parts could run at once on {len(self._nodes)} nodes, and there are {parts} blocks")
        return parts

    def sharing(self, building: Building, count: Count) -> Sharing:
        """What gives the parts of an output that was begun to these nodes."""
        tell = self._how.get("tell") or (lambda line: None)
        return Sharing(
            self._plan,
            building,
            building.output.digests,
            self._cluster,
            Roster(self._cluster, self._nodes, on=self._on, packed=self._packed, tell=tell),
            packed=self._packed,
            cores=self._plan.options.threads,
            silent_seconds=Crew.silent_seconds,
            progress=count.add,
            show=self._how.get("show_nodes"),
            tell=tell,
        )


@contextmanager
def _beating(building: Building) -> Iterator[None]:
    with kept_up([Beating(building)], StopFlag()):
        yield
