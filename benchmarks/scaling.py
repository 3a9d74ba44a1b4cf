"""How merges scale with the number of processes where each can move so much a second, and no more.

    python benchmarks/scaling.py [--engine torchrun|ray] [--read 50MB/s] [--write 50MB/s]
                                 [--checkpoints 10] [--mib 256] [--workers 1,2,4] [--rounds 3]

Checkpoints lie behind `slow://`, a driver of fsspec that is this machine's disk with a cap for each process,
and what is written has a cap too: time is made of the storage's rate, so that two cores are enough. Every
number of workers merges them in turn, processes under torchrun or nodes of a Ray cluster of one core each
(which is there before); the outputs are compared, and the time of each (from the plan on, until the output
has its name) with one worker's and with what `pma plan --nodes` predicts. The whole command's is told too,
with the launcher's start and end, and with Ray what one process takes without it.
`benchmarks/results/scaling.json` and `scaling-ray.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3
from fsspec.implementations.local import LocalFileSystem

from pma.formats.folder_writer import FolderPart
from pma.quantities import bytes_text, parse_rate

HERE = Path(__file__).parent
RESULTS = {"torchrun": HERE / "results" / "scaling.json", "ray": HERE / "results" / "scaling-ray.json"}
# every process of a node finds the slow storage
SITE = """
import fsspec
fsspec.register_implementation("slow", "scaling.Slow")
"""
READ_VARIABLE, WRITE_VARIABLE = "SLOW_READ_BYTES_PER_SECOND", "SLOW_WRITE_BYTES_PER_SECOND"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes a second that each process can move."""

    read: int
    write: int

    @property
    def environment(self) -> dict[str, str]:
        """What tells a process of them."""
        return {READ_VARIABLE: str(self.read), WRITE_VARIABLE: str(self.write), "OMP_NUM_THREADS": "1"}


class Throttle:
    """Lets so many bytes a second pass, one request after the other. From any thread."""

    def __init__(self, variable: str) -> None:
        self._bytes_per_second = float(os.environ.get(variable, "inf"))
        self._lock = threading.Lock()
        self._free_at = 0.0

    def passed(self, moved_bytes: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + moved_bytes / self._bytes_per_second
            until = self._free_at
        time.sleep(max(until - time.monotonic(), 0))


class Slow(LocalFileSystem):
    """The local disk, at so many bytes a second in each process; what that writes to any folder, too."""

    protocol = "slow"
    _throttle = Throttle(READ_VARIABLE)

    def __init__(self, *arguments: Any, **how: Any) -> None:
        super().__init__(*arguments, **how)
        slow_writes()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **how: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **how)
        Slow._throttle.passed(len(data))
        return data


@cache
def slow_writes() -> None:
    """Once in a process."""
    throttle, write = Throttle(WRITE_VARIABLE), FolderPart.write

    def slow_write(part: FolderPart, file: str, offset_bytes: int, values: memoryview) -> None:
        write(part, file, offset_bytes, values)
        throttle.passed(len(values))

    FolderPart.write = slow_write  # type: ignore[method-assign]


def command_line() -> None:
    """`pma`, with that driver."""
    from pma.cli import main as pma

    fsspec.register_implementation("slow", Slow)
    pma()


@contextmanager
def ray_nodes(count: int, folder: Path, rates: Rates) -> Iterator[str]:
    """The address of a cluster of so many nodes of one core, and a head of none."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    found = os.pathsep.join((str(site), str(HERE), os.environ.get("PYTHONPATH", "")))
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    from ray.cluster_utils import Cluster

    limits = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **limits})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, env_vars={**rates.environment, "PYTHONPATH": found}, **limits)
        yield cluster.address
    finally:
        cluster.shutdown()


def merged(run: Path, out: Path, workers: int, rates: Rates, engine: str) -> dict[str, Any]:
    """What `pma merge --json` of so many workers told, and the seconds of the whole command; of 0 workers,
    without an engine.
    """
    launch, merge = [sys.executable], ["merge", *_sources(run), "-o", str(out)]
    if engine == "torchrun" and workers > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    with ExitStack() as stack:
        if engine == "ray" and workers:
            address = stack.enter_context(ray_nodes(workers, out.parent, rates))
            merge += ["--on", "ray", "--ray-address", address]
        started = time.monotonic()
        return {**_told(launch, merge, rates), "command_seconds": time.monotonic() - started}


def predicted(run: Path, workers: int, rates: Rates, engine: str) -> float:
    """The seconds that `pma plan --nodes` tells, without those of planning, which is over when a merge's
    clock starts.
    """
    asked = ["--nodes", str(max(workers, 1)), "--read", str(rates.read), "--write", str(rates.write)]
    if engine == "ray" and workers:
        asked += ["--on", "ray"]
    told = _told([sys.executable], ["plan", *_sources(run), *asked], rates)["scaling"]
    return float(told["seconds"]) - float(told["planning_seconds"])


def _sources(run: Path) -> list[str]:
    return [f"slow://{path}" for path in sorted(run.iterdir())]


def _told(launch: list[str], arguments: list[str], rates: Rates) -> dict[str, Any]:
    command = [*launch, str(Path(__file__)), "--as-pma", *arguments, "--json"]
    environment = {**os.environ, **rates.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def digests(out: Path) -> dict[str, str]:
    return {path.name: blake3(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


def measured(
    folder: Path, run: Path, workers: list[int], rounds: int, rates: Rates, engine: str
) -> dict[str, Any]:
    """Seconds by number of workers, and what was predicted."""
    counted = [*([0] if engine == "ray" else []), *workers]
    seconds: dict[int, list[float]] = {count: [] for count in counted}
    streaming: dict[int, list[float]] = {count: [] for count in counted}
    commands: dict[int, list[float]] = {count: [] for count in counted}
    expected: dict[str, str] | None = None
    loads: list[float] = []
    for number in range(rounds):
        for count in counted:
            out = folder / "out"
            loads.append(os.getloadavg()[0])
            told = merged(run, out, count, rates, engine)
            seconds[count].append(told["seconds"])
            streaming[count].append(told["stream_seconds"])
            commands[count].append(told["command_seconds"])
            expected = expected or digests(out)
            assert digests(out) == expected, f"{count} workers made other bytes"
            shutil.rmtree(out)
            print(f"round {number}: {count} workers, {told['seconds']:.2f} s", flush=True)
    one = statistics.median(seconds[workers[0]])
    rows = []
    for count in counted:
        median, foreseen = statistics.median(seconds[count]), predicted(run, count, rates, engine)
        rows.append(
            {
                "workers": count,
                "seconds": seconds[count],
                "stream_seconds": streaming[count],
                "command_seconds": commands[count],
                "speed_up": one / median,
                "predicted_seconds": foreseen,
                "measured_to_predicted": median / foreseen,
            }
        )
    return {"rows": rows, "same_bits": True, "load_before_each": loads, "cores": os.cpu_count()}


def main() -> None:
    if sys.argv[1:2] == ["--as-pma"]:
        del sys.argv[1]
        command_line()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=RESULTS, default="torchrun")
    parser.add_argument("--read", default="50MB/s")
    parser.add_argument("--write", default="50MB/s")
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    rates = Rates(read=parse_rate(arguments.read), write=parse_rate(arguments.write))
    workers = [int(count) for count in arguments.workers.split(",")]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="scaling-") as folder:
        run = Path(folder) / "run"
        make = [sys.executable, str(HERE / "fixture.py"), str(run), "--mib", str(arguments.mib)]
        subprocess.run([*make, "--checkpoints", str(arguments.checkpoints)], check=True)
        result = measured(Path(folder), run, workers, arguments.rounds, rates, arguments.engine)
    result |= {
        "engine": arguments.engine,
        **asdict(rates),
        "checkpoints": arguments.checkpoints,
        "mib": arguments.mib,
    }
    RESULTS[arguments.engine].write_text(json.dumps(result, indent=1) + "\n")
    told = f"\neach process reads {bytes_text(rates.read)}/s and writes {bytes_text(rates.write)}/s"
    print(f"{told}, {arguments.checkpoints} × {arguments.mib} MiB")
    for row in result["rows"]:
        median, foreseen = statistics.median(row["seconds"]), row["predicted_seconds"]
        print(
            f"{row['workers']} workers: {median:.2f} s, {row['speed_up']:.2f} times as fast as one; "
            f"{row['measured_to_predicted']:.2f} of the predicted {foreseen:.2f} s"
        )


if __name__ == "__main__":
    main()
