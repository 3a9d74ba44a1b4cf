"""How merges scale with the number of processes where each can read so much a second, and no more.

    python benchmarks/scaling.py [--rate 50MB/s] [--checkpoints 10] [--mib 64] [--workers 1,2,4] [--rounds 3]

Checkpoints lie behind `slow://`, a driver of fsspec that is this machine's disk with a cap for each process:
time is made of the storage's rate, so that two cores are enough. Every number of workers merges them in turn
under torchrun; the outputs are compared, and the time of each (from the plan on, until the output has its
name) with one worker's and with what `pma plan --nodes` predicts. `benchmarks/results/scaling.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3
from fsspec.implementations.local import LocalFileSystem

from pma.quantities import bytes_text, parse_rate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scaling.json"
RATE_VARIABLE = "SLOW_BYTES_PER_SECOND"


class Slow(LocalFileSystem):
    """The local disk, at so many bytes a second in each process."""

    protocol = "slow"
    _lock = threading.Lock()
    _free_at = 0.0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **how: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **how)
        with Slow._lock:  # reads pass one after the other
            now = time.monotonic()
            Slow._free_at = max(Slow._free_at, now) + len(data) / float(os.environ[RATE_VARIABLE])
            until = Slow._free_at
        time.sleep(max(until - time.monotonic(), 0))
        return data


def command_line() -> None:
    """`pma`, with that driver."""
    from pma.cli import main as pma

    fsspec.register_implementation("slow", Slow)
    pma()


def merged(run: Path, out: Path, workers: int, rate: int) -> dict[str, Any]:
    """What `pma merge --json` of so many processes told, and the seconds of the whole command."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    started = time.monotonic()
    told = _told(launch if workers > 1 else [sys.executable], ["merge", *_sources(run), "-o", str(out)], rate)
    return {**told, "command_seconds": time.monotonic() - started}


def predicted(run: Path, workers: int, rate: int) -> float:
    """The seconds that `pma plan --nodes` tells, without those of planning, which is over when a merge's
    clock starts.
    """
    rates = ["--nodes", str(workers), "--read", str(rate), "--write", "2GB/s"]
    told = _told([sys.executable], ["plan", *_sources(run), *rates], rate)["scaling"]
    return float(told["seconds"]) - float(told["planning_seconds"])


def _sources(run: Path) -> list[str]:
    return [f"slow://{path}" for path in sorted(run.iterdir())]


def _told(launch: list[str], arguments: list[str], rate: int) -> dict[str, Any]:
    command = [*launch, str(Path(__file__)), "--as-pma", *arguments, "--json"]
    environment = {**os.environ, RATE_VARIABLE: str(rate), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def digests(out: Path) -> dict[str, str]:
    return {path.name: blake3(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


def measured(folder: Path, run: Path, workers: list[int], rounds: int, rate: int) -> dict[str, Any]:
    """Seconds by number of workers, and what was predicted."""
    seconds: dict[int, list[float]] = {count: [] for count in workers}
    commands: dict[int, list[float]] = {count: [] for count in workers}
    expected: dict[str, str] | None = None
    for number in range(rounds):
        for count in workers:
            out = folder / f"out-{number}-{count}"
            told = merged(run, out, count, rate)
            seconds[count].append(told["seconds"])
            commands[count].append(told["command_seconds"])
            expected = expected or digests(out)
            assert digests(out) == expected, f"{count} workers made other bytes"
            print(f"round {number}: {count} workers, {told['seconds']:.2f} s", flush=True)
    one = statistics.median(seconds[workers[0]])
    rows = []
    for count in workers:
        median, foreseen = statistics.median(seconds[count]), predicted(run, count, rate)
        rows.append(
            {
                "workers": count,
                "seconds": seconds[count],
                "command_seconds": commands[count],
                "speed_up": one / median,
                "predicted_seconds": foreseen,
                "measured_to_predicted": median / foreseen,
            }
        )
    return {"rows": rows, "same_bits": True}


def main() -> None:
    if sys.argv[1:2] == ["--as-pma"]:
        del sys.argv[1]
        command_line()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="50MB/s")
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    rate, workers = parse_rate(arguments.rate), [int(count) for count in arguments.workers.split(",")]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="scaling-") as folder:
        run = Path(folder) / "run"
        make = [sys.executable, str(HERE / "fixture.py"), str(run), "--mib", str(arguments.mib)]
        subprocess.run([*make, "--checkpoints", str(arguments.checkpoints)], check=True)
        result = measured(Path(folder), run, workers, arguments.rounds, rate)
    result |= {"rate": rate, "checkpoints": arguments.checkpoints, "mib": arguments.mib}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nread at {bytes_text(rate)}/s by each process, {arguments.checkpoints} × {arguments.mib} MiB")
    for row in result["rows"]:
        median, foreseen = statistics.median(row["seconds"]), row["predicted_seconds"]
        print(
            f"{row['workers']} workers: {median:.2f} s, {row['speed_up']:.2f} times as fast as one; "
            f"{row['measured_to_predicted']:.2f} of the predicted {foreseen:.2f} s"
        )


if __name__ == "__main__":
    main()
