"""`pma merge --on ray`: the same bits from the nodes of a cluster, and what is refused before anything is
written.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pma import engine
from pma.cli import app
from pma.testing import tiny_run

SHAPES = {"a": (5_000_000,), "b": (3_000_001,), "c": (4_900_000,)}  # seven chunks
# a node's process sees the files of OLD where others see those of NEW
STALE = """
import builtins, io, os
def elsewhere(call):
    def called(path, *arguments, **named):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(os.environ["NEW"]):
            path = os.environ["OLD"] + os.fspath(path)[len(os.environ["NEW"]):]
        return call(path, *arguments, **named)
    return called
for name in ("stat", "lstat", "open", "scandir", "listdir"):
    setattr(os, name, elsewhere(getattr(os, name)))
io.open = builtins.open = elsewhere(io.open)
"""


def node(**more: Any) -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, **more}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=node())
        made.add_node(**node())
        yield made
        made.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=2)
    return tmp_path / "run"


def pma(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pma", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def test_nodes_give_the_bits_of_one_process_and_see_the_same_files(
    cluster: Any, run: Path, tmp_path: Path
) -> None:
    merge = ("merge", run, "--last", 3, "--scheme", "wma", "--json", "-o")
    ray = ("--on", "ray", "--ray-address", cluster.address, "--threads", 1)
    alone, done = pma(*merge, tmp_path / "one"), pma(*merge, tmp_path / "out", *ray)
    assert done.returncode == 0, done.stderr[-3000:]
    told, of_one = json.loads(done.stdout), json.loads(alone.stdout)
    assert told.keys() == of_one.keys()
    assert (told["bytes_read"], told["bytes_written"]) == (of_one["bytes_read"], of_one["bytes_written"])
    assert weights(tmp_path / "out") == weights(tmp_path / "one")
    assert engine.verify(tmp_path / "out").findings == ()
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    nodes = [event["nodes"] for event in events if event["event"] == "nodes"][-1]
    assert len(nodes) == 2
    assert sum(one["bytes_written"] for one in nodes) == told["bytes_written"]
    assert sum(one["parts_done"] for one in nodes) == 7  # eight were wanted, and there are seven blocks

    old = tmp_path / "old"
    (old / "checkpoint-20").mkdir(parents=True)
    subprocess.run(["cp", "-a", *run.iterdir(), old], check=True)
    changed = "checkpoint-20/model-00002-of-00002.safetensors"
    os.utime(old / changed, (1, 1))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STALE)
    path = os.pathsep.join((str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")))
    stale = cluster.add_node(**node(env_vars={"PYTHONPATH": path, "NEW": str(run), "OLD": str(old)}))
    refused = pma(*merge, tmp_path / "two", *ray)
    cluster.remove_node(stale)
    assert refused.returncode == 3
    message = json.loads(refused.stdout)["error"]["message"]
    assert f"sees {run / changed} with time 1000000000 ns" in message
    assert f"{os.uname().nodename}/{stale.node_id[:8]}" in message
    assert [path.name for path in tmp_path.iterdir() if "two" in path.name] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ray-address", "10.0.0.1:6379"), "need --on ray"),
        (("--per-node", "2"), "need --on ray"),
        (("--on", "spark"), "--on spark is not known"),
        (("--on", "ray", "--per-node", "0"), "at least one part"),
        (("--on", "ray", "--measure-roofline"), "measures one process"),
        (("--on", "ray", "--ray-address", "nowhere"), "expected HOST:PORT"),
        (("--on", "ray", "--ray-address", "ray://head:10001"), "Ray Client"),
        (("--on", "ray", "--ray-address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_what_is_refused_before_any_node_is_asked(
    run: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = CliRunner().invoke(app, ["merge", str(run), "--last", "3", "-o", str(tmp_path / "out"), *flags])
    assert done.exit_code in (2, 3)
    assert message in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_launcher(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = ["merge", str(run), "--last", "3", "--on", "ray", "-o"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun or srun" in CliRunner().invoke(app, [*merge, str(tmp_path / "out")]).stderr
