"""Ray's own cluster of three nodes on this machine, whose tasks are slow, and merges on it as commands."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what every process of a node runs as it starts: the writer of blocks is slowed down when it is imported
SLOW = """
import importlib.abc, importlib.util, os, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "pma.formats.folder_writer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            write = module.FolderPart.write
            def slow(*arguments):
                write(*arguments)
                time.sleep(float(os.environ["SLOW_SECONDS"]))
            module.FolderPart.write = slow
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Slow())
"""
SOURCE = Path(__file__).parents[2] / "src"
OBJECT_STORE_BYTES = 80_000_000


def site(folder: Path, code: str) -> str:
    """A PYTHONPATH on which every process runs `code` as it starts."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join((str(folder), str(SOURCE)))


@contextmanager
def cluster(nodes: int, **environment: str) -> Iterator[Any]:
    """So many nodes of one core each, and a head without any."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    from ray.cluster_utils import Cluster

    limits = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **limits})
    try:
        made.workers = [add_node(made, **environment) for _ in range(nodes)]
        yield made
    finally:
        made.shutdown()


def add_node(made: Any, **environment: str) -> Any:
    """One more node, whose processes have these variables."""
    return made.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, env_vars=environment)


def command(address: str, run: Path, out: Path, *more: str) -> list[str]:
    """A merge on that cluster."""
    merge = [sys.executable, "-m", "pma", "merge", str(run), "--last", "3", "--json", "-o", str(out)]
    return [*merge, "--threads", "1", "--on", "ray", "--ray-address", address, *more]


def start(*arguments: Any) -> subprocess.Popen[str]:
    """Start one; its words are piped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def await_workers(cluster: Any, merging: subprocess.Popen[str], seconds: float) -> list[int]:
    """Processes that carry out parts, so long after the first of them began; none where the merge ended."""
    while merging.poll() is None:
        if workers(cluster):
            time.sleep(seconds)
            return workers(cluster)
        time.sleep(0.05)
    return []


def workers(cluster: Any, name: str = "carry_out_part") -> list[int]:
    """Processes of this cluster that carry out a part now: Ray names them so, and their words go to files of
    its session, wherever their parents are.
    """
    session, found = cluster.head_node.get_session_dir_path(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                said, words = (folder / "cmdline").read_bytes(), os.readlink(folder / "fd" / "1")
            except OSError:
                continue
            if said.startswith(b"ray::") and name.encode() in said and words.startswith(session):
                found.append(int(folder.name))
    return found


def workers_end(cluster: Any, seconds: float = 15) -> bool:
    """Whether nobody carries out a part any more, within some seconds: Ray ends processes after their job."""
    deadline = time.monotonic() + seconds
    while workers(cluster) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not workers(cluster)


def kill(pid: int) -> bool:
    """SIGKILL; False where it went before."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
