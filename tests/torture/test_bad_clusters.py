"""Clusters, and nodes of one, that cannot do what is asked: each error names the node and what is wrong with
it, before anything is written, and what an earlier attempt did is kept.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pma import engine, trajectory
from pma.engine.journal import Followed, journals_of_others
from pma.engine.lease import LEASE_FILE
from pma.engine.staging import staging_folder
from pma.testing import tiny_run

from . import ray_cluster as ray
from .checks import check_finished, weights_of

SHAPES = {"a": (9_000_000,), "b": (3_000_001,), "c": (8_900_000,)}  # eleven chunks
OLDER = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "0.0.1" if name == "pma-llm" else version(name)
"""
WITHOUT = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pma":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
"""
READ_ONLY = """
import errno, os
really = os.open
def refused(path, flags, *arguments, **named):
    if flags & os.O_CREAT and os.fspath(path).startswith(os.environ["READ_ONLY"]):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
    return really(path, flags, *arguments, **named)
os.open = refused
"""
OTHER_RAY = """
import ray
ray.__version__ = "2.1.0"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One node, whose tasks are slow."""
    path = ray.site(tmp_path_factory.mktemp("slow") / "site", ray.SLOW)
    with ray.cluster(1, SLOW_SECONDS="0.3", PYTHONPATH=path) as made:
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=2)
    return tmp_path / "run"


def merged(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ray.command(*arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ray.SOURCE), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What a merge failed with, in words."""
    assert done.returncode in (2, 3), (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr
    message: str = json.loads(done.stdout)["error"]["message"]
    return message


@contextmanager
def one_more(cluster: Any, site: Path, code: str, **environment: str) -> Iterator[str]:
    """The name of a second node, whose processes run `code` first."""
    node = ray.add_node(cluster, PYTHONPATH=ray.site(site, code), **environment)
    try:
        yield f"{os.uname().nodename}/{node.node_id[:8]}"
    finally:
        cluster.remove_node(node)


def expected(run: Path, out: Path) -> dict[str, str]:
    with engine.plan(trajectory.discover([run]).points) as plan:
        engine.write(plan, out)
    return weights_of(out)


def journaled(hidden: Path) -> bool:
    """Whether something would be gone on with."""
    return hidden.is_dir() and any(Followed(path).news() for path in journals_of_others(hidden))


def test_nodes_that_cannot_take_part(cluster: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merging, hidden = ray.start(cluster.address, run, out), staging_folder(out)
    while not journaled(hidden):
        assert merging.poll() is None, merging.communicate()
        time.sleep(0.05)
    merging.kill()
    merging.communicate()
    assert ray.workers_end(cluster)
    before = {path.name: path.read_bytes() for path in hidden.iterdir() if path.name != LEASE_FILE}

    for site, code, environment, words in (
        ("older", OLDER, {}, "pma-llm 0.0.1, and "),
        ("without", WITHOUT, {}, "pma-llm cannot be imported by"),
        ("read-only", READ_ONLY, {"READ_ONLY": str(tmp_path)}, f"{hidden}/.pma-part-"),
    ):
        with one_more(cluster, tmp_path / site, code, **environment) as name:
            message = refused(merged(cluster.address, run, out))
        assert name in message
        assert words in message
        assert "Nothing was written" in message
        kept = {path.name: path.read_bytes() for path in hidden.iterdir()}
        assert {file: kept.get(file) for file in before} == before

    done = merged(cluster.address, run, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["bytes_resumed"] > 0
    check_finished(out, expected(run, tmp_path / "one"))


def test_another_version_of_ray(cluster: Any, run: Path, tmp_path: Path) -> None:
    path = ray.site(tmp_path / "site", OTHER_RAY)
    message = refused(merged(cluster.address, run, tmp_path / "out", PYTHONPATH=path))
    assert f"the Ray cluster at {cluster.address} is of another version" in message
    assert "2.1.0" in message
    assert "Use the same Ray and Python on every node" in message
    assert not list(tmp_path.glob("*out*"))


def test_a_second_driver_and_more_slots_than_blocks(cluster: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ray.start(cluster.address, run, out, "--per-node", "16")
    assert ray.await_workers(cluster, first, seconds=0.5)
    message = refused(merged(cluster.address, run, out))
    assert str(out) in message
    assert f"process {first.pid}" in message
    said, told = first.communicate(timeout=120)
    assert first.returncode == 0, told[-3000:]
    assert "16 parts could run at once on 1 nodes, and there are 11 blocks" in told
    assert json.loads(said)["bytes_resumed"] == 0
    check_finished(out, expected(run, tmp_path / "one"))


def test_no_cluster_is_there_any_more(run: Path, tmp_path: Path) -> None:
    """The port of a cluster that ended: told within seconds."""
    started = time.monotonic()
    message = refused(merged("127.0.0.1:9", run, tmp_path / "out"))
    assert "no Ray cluster answers at 127.0.0.1:9" in message
    assert time.monotonic() - started < 30
    assert not list(tmp_path.glob("*out*"))
