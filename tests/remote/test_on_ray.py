"""A merge into a store by the nodes of a cluster that is an object here: what they are told."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pma import engine, trajectory
from pma.cluster import Node, OnRay
from pma.engine.commit import Count
from pma.engine.journal import Followed, driver_journal
from pma.engine.on_ray.meeting import Meeting
from pma.engine.stopping import StopFlag
from pma.engine.together.in_store import StoreAttempt
from pma.engine.together.places import look_anew
from pma.remote import location
from pma.testing import tiny_run

NODES = [Node(key=key, name=f"node {key}", slots=1, cores=4.0) for key in "ab"]


class Cluster:
    """Of two nodes, which look; Ctrl-C comes while they carry out parts."""

    def __init__(self, held: StoreAttempt) -> None:
        self._held = held
        self.specs: list[Any] = []
        self.given: list[object] = []
        self.awaited: list[tuple[list[object], float, bool]] = []

    def nodes(self) -> list[Node]:
        return NODES

    def start(self, node: Node, function: Any, packed: bytes, *arguments: Any, cores: float) -> object:
        self.specs.append(pickle.loads(packed))
        task = object()
        if "carry_out" in function.__name__:
            self.given.append(task)
        return task

    def ended(self, tasks: Sequence[object], seconds: float) -> list[object]:
        if self.given:
            raise KeyboardInterrupt
        return list(tasks)

    def answer(self, task: object) -> dict[str, Any]:
        return {}

    def await_end(self, tasks: Sequence[object], seconds: float) -> None:
        look_anew(self._held.out)
        driver = Followed(self._held.out / driver_journal(self._held.token))
        driver.news()
        self.awaited.append((list(tasks), seconds, "failed" in driver.said))


def test_parts_that_run_are_told_of_a_failure_and_end_before_this_process_leaves(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = tiny_run(tmp_path / "run", steps=3, shapes={"a": (7_000,), "b": (61, 53)}, shards=2)
    out = location("memory://out")
    with engine.plan(trajectory.from_checkpoints(paths).points) as plan:
        held = StoreAttempt(plan, out)
        cluster: Any = Cluster(held)
        meeting = Meeting(plan, out, cluster, OnRay(), {"staging": Path("fast")})
        meeting.meet(held)
        with pytest.raises(KeyboardInterrupt):
            meeting.carry_out(held, {}, Count(None), StopFlag())
        meeting.driver.close()
    assert {spec.staging for spec in cluster.specs} == {tmp_path / "fast"}
    looked, (tasks, seconds, told) = cluster.awaited
    assert looked[0] == []
    assert tasks == cluster.given
    assert seconds <= 6
    assert told
