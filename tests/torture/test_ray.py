"""SIGKILL of processes that carry out parts on a Ray cluster, of its nodes and of the driver: the merge
finishes, or the same command finishes it, with the same bits; nothing looks complete before.
"""

import json
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from pma import engine, trajectory
from pma.engine.staging import staging_folder
from pma.testing import tiny_run

from . import ray_cluster as ray
from .checks import check_complete, check_finished, check_journal, weights_of
from .test_together import check_journals_of_others

SHAPES = {"a": (9_000_000,), "b": (3_000_001,), "c": (8_900_000,)}  # ten chunks
KILLS = 20
NODES, MOST_NODES_REMOVED = 3, 2
SLOWER = {"SLOW_SECONDS": "0.5"}


def test_workers_nodes_and_drivers_killed(tmp_path: Path, chance: random.Random, multiplier: int) -> None:
    run = tmp_path / "run"
    points = trajectory.from_checkpoints(tiny_run(run, steps=3, shapes=SHAPES, shards=2)).points
    with engine.plan(points) as plan:
        engine.write(plan, tmp_path / "one")
    expected = weights_of(tmp_path / "one")
    environment = {**SLOWER, "PYTHONPATH": ray.site(tmp_path / "site", ray.SLOW)}
    kills = dict.fromkeys(("worker", "node", "driver", "interrupt"), 0)
    resumed = outputs = 0
    folder = tmp_path / "work"
    with ray.cluster(NODES, **environment) as cluster:
        while sum(kills.values()) < KILLS * multiplier or not (resumed and all(kills.values())):
            folder.mkdir()
            out, outputs = folder / "out", outputs + 1
            while not out.exists():
                merging = ray.start(cluster.address, run, out)
                while merging.poll() is None:
                    victim = _kill_something(merging, cluster, environment, kills, chance)
                    if victim in ("driver", "interrupt"):
                        break
                said, told = merging.communicate(timeout=120)
                check_complete(folder, {out: expected})
                if merging.returncode == 0:
                    resumed += json.loads(said)["bytes_resumed"] > 0
                    break
                assert merging.returncode in (-signal.SIGKILL, 4, 3), (
                    victim,
                    merging.returncode,
                    told[-6000:],
                )
                assert "Traceback" not in told, told[-2000:]
                assert merging.returncode != 3 or "failed 4 times" in told, told[-2000:]
                check_journal(staging_folder(out))
                check_journals_of_others(staging_folder(out))
            check_finished(out, expected)
            assert [path for path in folder.iterdir() if path != out] == []
            assert ray.workers_end(cluster)
            shutil.rmtree(folder)
    print(f"\n{kills}, {outputs} outputs, {resumed} resumed")


def _kill_something(
    merging: subprocess.Popen[str],
    cluster: Any,
    environment: dict[str, str],
    kills: dict[str, int],
    chance: random.Random,
) -> str | None:
    """Wait until parts run, and a while; then kill something, if the merge still goes on. Returns what."""
    victims = ray.await_workers(cluster, merging, seconds=chance.uniform(0.1, 1.2))
    if not victims or merging.poll() is not None:
        return None
    left = MOST_NODES_REMOVED - kills["node"]
    (what,) = chance.choices(("worker", "node", "driver", "interrupt"), (10, 2 * (left > 0), 2, 1))
    if what == "worker" and not ray.kill(chance.choice(victims)):
        return None
    if what == "node":
        node = cluster.workers.pop(chance.randrange(len(cluster.workers)))
        cluster.remove_node(node, allow_graceful=False)
        cluster.workers.append(ray.add_node(cluster, **environment))
    if what == "driver":
        merging.kill()
    if what == "interrupt":
        merging.send_signal(signal.SIGINT)
    kills[what] += 1
    return what
