"""Outputs in a store from the nodes of a Ray cluster: the same tensors, whatever is killed; a file that
arrived stays, and is sent once.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pma import engine, formats, trajectory
from pma.remote import location
from pma.testing import tiny_run
from pma.testing.reference import read_all

from ..remote.conftest import Bucket, bucket, started_server
from . import ray_cluster as ray

__all__ = ["bucket", "started_server"]

SHAPES = dict.fromkeys("abcdefgh", (2_100_000,))
NODES = 3


@pytest.fixture
def cluster(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes that are slow at writing, and know the bucket."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets have short names or none
    with ray.cluster(NODES, SLOW_SECONDS="0.4", PYTHONPATH=ray.site(tmp_path / "site", ray.SLOW)) as made:
        yield made


def run_of(tmp_path: Path, shards: int) -> Path:
    tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=shards)
    with engine.plan(trajectory.discover([tmp_path / "run"]).points) as plan:
        engine.write(plan, tmp_path / "one")
    return tmp_path / "run"


def finished(bucket: Bucket, tmp_path: Path) -> list[str]:
    """The files of weights, if all is there as one process makes it, and nothing else is."""
    found, out = bucket.files("out"), location(f"{bucket.url}/out")
    assert not [name for name in found if name.startswith(".")]
    assert not list((tmp_path / "staging").rglob("*-parts/*"))
    assert read_all(out) == read_all(tmp_path / "one")
    assert engine.verify(out, samples=None).findings == ()
    return [name for name in found if name.endswith(".safetensors")]


def arrived(bucket: Bucket) -> dict[str, Any]:
    """The files of weights that are there, and when they came."""
    bucket.driver.invalidate_cache()
    found = bucket.driver.find(f"{bucket.name}/out", detail=True)
    return {name: entry["LastModified"] for name, entry in found.items() if name.endswith(".safetensors")}


def test_few_files_are_cut_for_the_nodes(bucket: Bucket, cluster: Any, tmp_path: Path) -> None:
    run = run_of(tmp_path, shards=2)
    done = subprocess.run(
        ray.command(cluster.address, run, f"{bucket.url}/out", "--sha256"),
        env={**os.environ, "PYTHONPATH": str(ray.SOURCE)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 output files are fewer than 3 processes" in done.stderr
    assert "re-sharded into 3" in done.stderr
    assert len(finished(bucket, tmp_path)) == 3
    told = json.loads(done.stdout)
    assert (told["bytes_resumed"], told["bytes_written"]) == (0, _bytes_written(run))
    files = bucket.files("out")
    told_of = {file["name"]: file["sha256"] for file in json.loads(files["pma.json"])["outputs"]}
    assert told_of == {name: sha256(files[name]).hexdigest() for name in told_of}


def _bytes_written(run: Path) -> int:
    with engine.plan(trajectory.discover([run]).points) as plan:
        return plan.resharded(NODES).bytes_to_write


def test_workers_and_drivers_killed(bucket: Bucket, cluster: Any, tmp_path: Path) -> None:
    """Eight files: a worker is killed while it makes one, the driver once some have arrived."""
    run = run_of(tmp_path, shards=8)
    out = f"{bucket.url}/out"
    merging = ray.start(cluster.address, run, out)
    victims = ray.await_workers(cluster, merging, seconds=0.3)
    assert ray.kill(victims[0])
    while len(arrived(bucket)) < 4 and merging.poll() is None:
        assert formats.read_meta(location(out)).incomplete is not None
    assert merging.poll() is None, merging.communicate()
    merging.kill()
    merging.communicate()
    assert ray.workers_end(cluster)
    before = arrived(bucket)
    assert "pma.json" not in bucket.files("out")

    again = ray.start(cluster.address, run, out)
    said, told = again.communicate(timeout=120)
    assert again.returncode == 0, told[-3000:]
    assert json.loads(said)["bytes_resumed"] > 0
    assert len(finished(bucket, tmp_path)) == 8
    # what had arrived stayed, but for what its node had not told of yet
    after = arrived(bucket)
    assert sum(after[name] != at for name, at in before.items()) < NODES


def test_an_interrupted_driver_leaves_nothing_staged(bucket: Bucket, cluster: Any, tmp_path: Path) -> None:
    """Nodes remove the files that they were making before Ray ends their processes."""
    staging = tmp_path / "staging"
    run, out = run_of(tmp_path, shards=1), f"{bucket.url}/out"
    merging = ray.start(cluster.address, run, out, "--staging", str(staging))
    assert ray.await_workers(cluster, merging, seconds=0.5)
    assert list(staging.glob("*-parts/*/*.safetensors"))
    merging.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, told = merging.communicate(timeout=60)
    assert merging.returncode == 4, told[-3000:]
    assert time.monotonic() - started < 15
    assert not list(staging.glob("*-parts/*"))
