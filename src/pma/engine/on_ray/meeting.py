"""The nodes of a cluster met under the lease of an output, and its parts cut for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pma.cluster import Cluster, Node, OnRay
from pma.engine.building import SAVE_SECONDS, kept_up
from pma.engine.commit import Count, How
from pma.engine.lease import host
from pma.engine.on_ray.checking import check_all
from pma.engine.on_ray.roster import Roster
from pma.engine.on_ray.sharing import Sharing, part_count
from pma.engine.on_ray.task import Spec, portable
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.stream import Digests
from pma.engine.together.crew import Crew
from pma.engine.together.driver import Driver, Held
from pma.engine.together.part import Beating
from pma.remote import RemotePath

_PARTS_PER_SLOT = 4
# a part hears that the merge failed when it saves
_END_SECONDS = SAVE_SECONDS + 1.0


class Meeting:
    """The nodes of a cluster, from when they are met until they have carried out all parts.

    `driver` is what speaks to those who carry them out.
    """

    def __init__(self, plan: Plan, out: Path, cluster: Cluster, on: OnRay, how: How) -> None:
        self._plan, self._out, self._cluster, self._on, self._how = plan, out, cluster, on, how
        self.driver = Driver(plan, [], Crew(rank=0, size=1), who=f"the driver on {host()}")
        self._nodes: list[Node] = []
        self._packed = b""

    def meet(self, held: Held) -> None:
        """Have every node look at the sources and write where the output is built. Raises what is wrong."""
        self.driver.meet(held)
        points, options = portable(self._plan)
        staging = self._how.get("staging")
        self._packed = Spec(
            points=points,
            options=options,
            as_given=self._plan.as_given,
            files=len(self._plan.layout.files),
            out=self._out.absolute(),
            token=held.token,
            staging=None if staging is None else staging.absolute(),
            sha256=self._how.get("sha256", False),
            save_seconds=self._how.get("save_seconds", SAVE_SECONDS),
            silent_seconds=Crew.silent_seconds,
        ).packed()
        with self.driver.telling(), kept_up([Beating(held.show_life), self.driver], StopFlag()):
            self._nodes = check_all(self._cluster, self._packed, self._on.node_seconds)

    def carry_out(self, held: Held, done: Digests, count: Count, stop: StopFlag) -> None:
        """Have the nodes make what is missing. Raises what cannot be mended."""
        tell = self._how.get("tell") or (lambda line: None)
        roster = Roster(self._cluster, self._nodes, on=self._on, packed=self._packed, tell=tell)
        sharing = Sharing(
            self._plan,
            held,
            done,
            self._cluster,
            roster,
            packed=self._packed,
            cores=self._plan.options.threads,
            silent_seconds=Crew.silent_seconds,
            call_off=self.driver.call_off,
            progress=count.add,
            show=self._how.get("show_nodes"),
            tell=tell,
        )
        try:
            with self.driver.telling():
                sharing.carry_out(self._parts(done), stop)
        finally:
            # what still runs when we leave is killed, and would leave its files in the node's own folder
            if isinstance(self._out, RemotePath):
                sharing.await_end(_END_SECONDS)

    def _parts(self, done: Digests) -> Sequence[Part]:
        slots = sum(node.slots for node in self._nodes)
        in_store = isinstance(self._out, RemotePath)
        count = part_count(self._plan, done, _PARTS_PER_SLOT * slots)
        if in_store:
            count = min(count, len(self._plan.layout.files))
        if (tell := self._how.get("tell")) is not None and count < slots:
            what = "files" if in_store else "blocks"
            tell(f"{slots} parts could run at once on {len(self._nodes)} nodes, and there are {count} {what}")
        return self._plan.partition(count, whole_files=in_store, done=done)
