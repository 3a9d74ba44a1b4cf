"""How fast a merge is: beside plain reads and writes of the same bytes, a torch loop, and mergekit.

    python benchmarks/merge_speed.py [--checkpoints 10] [--mib 1024] [--threads 2] [--pairs 7] [--folder DIR]
                                     [--skip-mergekit] [--results DIR]

Makes sharded bf16 Llama checkpoints (`fixture.py`), checks that all merge them alike, then takes turns, round
by round: the roofline (`roofline.py`), `pma merge`, and the peers (`peers.py`). Hot: the sources are read
once, untimed, before each measurement. Cold: their pages are dropped before each. Nobody pays for another's
dirty pages, and outputs are removed outside the timing. Writes `merge_speed.json` and `merge_speed.png`.

This process stays small, since Linux counts the memory of the process that starts a command as the command's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import summary
from roofline import BLOCK_BYTES, REQUEST_BYTES, roofline, weight_files

HERE = Path(__file__).parent
MIB = 2**20
FEWEST_CHECKPOINTS = 2
START_SECONDS = 1.2
SPARE_CHECKPOINTS = 4  # room for the outputs, three of which exist at once while they are compared
Times = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A run of checkpoints, a scratch folder beside it, and how many threads read."""

    scratch: Path
    checkpoints: list[Path]
    threads: int

    @property
    def run(self) -> Path:
        return self.scratch / "run"

    def roofline(self, out: Path) -> Times:
        # as long as our command takes to begin: meanwhile the host takes back some of the touched memory
        time.sleep(START_SECONDS)
        return roofline(self.checkpoints, out, self.threads)

    def ours(self, out: Path) -> Times:
        return self.merged([str(self.run), "--last", str(len(self.checkpoints))], out)

    def merged(self, chosen: list[str], out: Path) -> Times:
        """`pma merge` of what the arguments choose."""
        command = [sys.executable, "-m", "pma", "merge", *chosen, "-o", str(out)]
        command += ["--threads", str(self.threads), "--json"]
        times, printed = self.whole_command(command, out)
        told = json.loads(printed)
        keys = ("seconds", "stream_seconds", "durable_seconds")
        times |= {f"own_{key}": told[key] for key in keys if key in told}
        if "peak_memory_bytes" in told:
            times["own_peak_MiB"] = told["peak_memory_bytes"] / MIB
        return times

    def naive(self, out: Path) -> Times:
        command = [sys.executable, str(HERE / "peers.py"), "naive", str(self.run), str(out)]
        return self.whole_command(command, out)[0]

    def mergekit(self, out: Path) -> Times:
        command = peers.mergekit_command(self.checkpoints, self.scratch / "mergekit.yml", out)
        return self.whole_command(command, out)[0]

    def whole_command(self, command: list[str], out: Path) -> tuple[Times, str]:
        """A command's wall time, with and without a sync of its output, its peak memory, its stdout."""
        log = self.scratch / "stderr"
        environment = os.environ | peers.OFFLINE | {"HF_HOME": str(self.scratch / "huggingface")}
        with tempfile.TemporaryFile("w+") as stdout, log.open("w") as stderr:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            sync_files(out)
            durable_seconds = time.perf_counter() - started
            stdout.seek(0)
            printed = stdout.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{printed}\n{log.read_text()}\nexit {process.returncode}")
        peak_mib = usage.ru_maxrss / 1024
        return {"seconds": seconds, "durable_seconds": durable_seconds, "peak_MiB": peak_mib}, printed


def sync_files(folder: Path) -> None:
    """Make a checkpoint's files durable; costs next to nothing where they already are."""
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def make_checkpoints(scratch: Path, wanted: int, mib: int, copies: int = 1) -> list[Path]:
    """As many checkpoints as were asked for, or as there is room for, and says so."""
    room = shutil.disk_usage(scratch).free // (copies * mib * MIB) - SPARE_CHECKPOINTS
    count = min(wanted, room)
    if count < FEWEST_CHECKPOINTS:
        raise SystemExit(f"{scratch} has no room for {FEWEST_CHECKPOINTS + SPARE_CHECKPOINTS} x {mib} MiB")
    if count < wanted:
        print(
            f"{count} checkpoints instead of {wanted}: {wanted + SPARE_CHECKPOINTS} x {mib} MiB are not free"
        )
    command = [sys.executable, str(HERE / "fixture.py"), str(scratch / "run")]
    subprocess.run([*command, "--checkpoints", str(count), "--mib", str(mib)], check=True)
    return peers.in_order(scratch / "run")


def prepare(checkpoints: list[Path], cache: str) -> None:
    """Bring the sources into the page cache, or drop them from it, with nothing left to write back."""
    os.sync()
    buffer = bytearray(REQUEST_BYTES)
    for file in (file for checkpoint in checkpoints for file in weight_files(checkpoint)):
        with file.open("rb", buffering=0) as opened:
            if cache == "cold":
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "hot" and opened.readinto(buffer):
                pass
    touch_free_memory(
        checkpoints[0].parent.parent, sum(f.stat().st_size for f in weight_files(checkpoints[0]))
    )


def touch_free_memory(folder: Path, output_bytes: int) -> None:
    """Write and delete as much as an output and a half.

    A virtual machine gives memory that was freed back to its host, and whoever writes next waits for it page
    by page, up to five times as long. This way nobody does.
    """
    scratch = folder / "scratch"
    with scratch.open("wb", buffering=0) as opened:
        for _ in range(output_bytes * 3 // 2 // MIB):
            opened.write(bytes(MIB))
    scratch.unlink()


def agreement(bench: Bench, with_mergekit: bool) -> dict[str, Any]:
    """Merge once with each, and compare the outputs to the bit."""
    makers = {"ours": bench.ours, "naive": bench.naive}
    if with_mergekit:
        makers["mergekit"] = bench.mergekit
    outs = {name: bench.scratch / f"agree-{name}" for name in makers}
    found = {}
    for name, make in makers.items():
        make(outs[name])
        if name != "ours":
            command = [sys.executable, str(HERE / "peers.py"), "compare", str(outs["ours"]), str(outs[name])]
            compared = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[f"{name}_and_ours"] = json.loads(compared.stdout)
            print(f"{name} and ours: {found[f'{name}_and_ours']}", flush=True)
    for out in outs.values():
        shutil.rmtree(out)
    return found


def measure(bench: Bench, cache: str, rounds: int, with_mergekit: bool) -> dict[str, list[Times]]:
    """Times by name, one entry a round; everybody has a turn in each round, the roofline just before ours."""
    takers: dict[str, Callable[[Path], Times]] = {
        "roofline": bench.roofline,
        "ours": bench.ours,
        "naive": bench.naive,
    }
    if with_mergekit:
        takers["mergekit"] = bench.mergekit
    measured: dict[str, list[Times]] = {name: [] for name in takers}
    warm_up = 1 if cache == "hot" else 0
    for number in range(1 - warm_up, rounds + 1):
        line = []
        for name, take in takers.items():
            out = bench.scratch / "out"
            prepare(bench.checkpoints, cache)
            times = {key: round(value, 4) for key, value in take(out).items()}
            shutil.rmtree(out)
            line.append(f"{name} {times.get('seconds', times['durable_seconds']):.2f} s")
            if number:
                measured[name].append(times)
        print(f"{cache}, round {number or 'to warm up'}: {', '.join(line)}", flush=True)
    return measured


def parsed(description: str | None) -> argparse.Namespace:
    """The arguments of a benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--mib", type=int, default=1024, help="size of one checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7, help="rounds")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--skip-mergekit", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parsed(__doc__)
    with_mergekit = not arguments.skip_mergekit
    versions = peers.install_mergekit() if with_mergekit else None
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="merge-speed-") as folder:
        checkpoints = make_checkpoints(Path(folder), arguments.checkpoints, arguments.mib)
        bench = Bench(scratch=Path(folder), checkpoints=checkpoints, threads=arguments.threads)
        results: dict[str, Any] = {
            "checkpoints_wanted": arguments.checkpoints,
            "checkpoints": len(checkpoints),
            "checkpoint_bytes": sum(file.stat().st_size for file in weight_files(checkpoints[0])),
            "shards": len(weight_files(checkpoints[0])),
            "threads": arguments.threads,
            "rounds": arguments.pairs,
            "request_bytes": REQUEST_BYTES,
            "block_bytes": BLOCK_BYTES,
            "machine": summary.machine(versions),
            "agreement": agreement(bench, with_mergekit),
        }
        measured = {c: measure(bench, c, arguments.pairs, with_mergekit) for c in ("hot", "cold")}
    own_peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results |= {"peak_MiB_of_this_process": round(own_peak_mib)} | summary.summarised(measured)
    results["times"] = measured
    arguments.results.mkdir(exist_ok=True)
    (arguments.results / "merge_speed.json").write_text(json.dumps(results, indent=1) + "\n")
    summary.draw(results, arguments.results / "merge_speed.png")
    print("\n" + summary.markdown(results))


if __name__ == "__main__":
    main()
