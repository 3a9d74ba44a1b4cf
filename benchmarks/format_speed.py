"""How fast merges of distributed checkpoints and of torch.save's files are, beside plain reads and writes.

    python benchmarks/format_speed.py [--checkpoints 10] [--mib 1024] [--threads 2] [--pairs 7] [--folder DIR]
                                      [--results DIR]

The checkpoints of `merge_speed.py`, saved again by torch.distributed.checkpoint from two ranks and from four,
and by torch.save. Takes turns, round by round: plain reads and writes of the same files, `pma merge`, and
for distributed checkpoints the naive way (torch.distributed.checkpoint.load of each into a full state dict,
added in fp32) and a merge whose newest source is sharded in two and all others in four. Writes
`format_speed.json`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge_speed
import peers
import summary
from merge_speed import HERE, START_SECONDS, Bench, Times, prepare
from roofline import roofline, weight_files

LABELS = {
    "dcp": "DCP, two ranks",
    "dcp_resharded": "DCP, newest of two ranks, others of four",
    "dcp_naive": "DCP, load into full state dicts",
    "torch": "torch.save",
}


def make_runs(scratch: Path, checkpoints: list[Path]) -> dict[str, list[Path]]:
    """The run in every format, and one whose shards differ from checkpoint to checkpoint."""
    run = checkpoints[0].parent
    program = [sys.executable, str(HERE / "format_fixture.py")]
    for name, ranks in (("dcp", 2), ("dcp4", 4)):
        folder = scratch / name
        subprocess.run([*program, "dcp", str(run), str(folder), "--ranks", str(ranks)], check=True)
    subprocess.run([*program, "torch", str(run), str(scratch / "torch")], check=True)
    shutil.rmtree(run)
    found = {name: peers.in_order(scratch / name, "*-*") for name in ("dcp", "dcp4", "torch")}
    found["dcp_resharded"] = [*found.pop("dcp4")[:-1], found["dcp"][-1]]
    return found


def turns(bench: Bench, runs: dict[str, list[Path]]) -> dict[str, tuple[list[Path], Callable[[Path], Times]]]:
    """What is measured: the sources that each reads, and how."""

    def ours(sources: list[Path]) -> Callable[[Path], Times]:
        return lambda out: bench.merged(list(map(str, sources)), out)

    def plain(sources: list[Path]) -> Callable[[Path], Times]:
        def measured(out: Path) -> Times:
            time.sleep(START_SECONDS)
            return roofline(sources, out, bench.threads)

        return measured

    def naive(out: Path) -> Times:
        command = [sys.executable, str(HERE / "peers.py"), "naive-dcp", str(runs["dcp"][0].parent), str(out)]
        return bench.whole_command(command, out)[0]

    found = {}
    for name in ("dcp", "torch"):
        found[f"{name}_roofline"] = (runs[name], plain(runs[name]))
        found[name] = (runs[name], ours(runs[name]))
    found["dcp_resharded"] = (runs["dcp_resharded"], ours(runs["dcp_resharded"]))
    found["dcp_naive"] = (runs["dcp"], naive)
    return found


def measure(bench: Bench, runs: dict[str, list[Path]], cache: str, rounds: int) -> dict[str, list[Times]]:
    """Times by name, one entry a round."""
    takers = turns(bench, runs)
    measured: dict[str, list[Times]] = {name: [] for name in takers}
    warm_up = 1 if cache == "hot" else 0
    for number in range(1 - warm_up, rounds + 1):
        line = []
        for name, (sources, take) in takers.items():
            out = bench.scratch / "out"
            prepare(sources, cache)
            times = {key: round(value, 4) for key, value in take(out).items()}
            shutil.rmtree(out)
            line.append(f"{name} {times.get('seconds', times['durable_seconds']):.2f} s")
            if number:
                measured[name].append(times)
        print(f"{cache}, round {number or 'to warm up'}: {', '.join(line)}", flush=True)
    return measured


def ratios(measured: dict[str, list[Times]]) -> dict[str, Any]:
    """Ratios within rounds: above 1 we are the faster, but for `resharded_over_same`."""

    def ratio(one: str, key_one: str, other: str, key_other: str) -> dict[str, float]:
        pairs = zip(measured[one], measured[other], strict=True)
        return summary.spread([a[key_one] / b[key_other] for a, b in pairs])

    found = {}
    for name in ("dcp", "torch"):
        for key in ("stream_seconds", "durable_seconds"):
            found[f"roofline_over_{name}_{key}"] = ratio(f"{name}_roofline", key, name, f"own_{key}")
    found["naive_over_dcp"] = ratio("dcp_naive", "seconds", "dcp", "seconds")
    found["resharded_over_same"] = ratio("dcp_resharded", "own_stream_seconds", "dcp", "own_stream_seconds")
    for name in ("dcp", "dcp_resharded", "torch", "dcp_naive"):
        found[f"{name}_peak_MiB"] = summary.spread([times["peak_MiB"] for times in measured[name]])
    return found


def main() -> None:
    arguments = merge_speed.parsed(__doc__)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="format-speed-") as folder:
        scratch = Path(folder)
        # three copies of every checkpoint are on the disk at once, and outputs
        checkpoints = merge_speed.make_checkpoints(scratch, arguments.checkpoints, arguments.mib, copies=4)
        count = len(checkpoints)
        runs = make_runs(scratch, checkpoints)
        bench = Bench(scratch=scratch, checkpoints=runs["dcp"], threads=arguments.threads)
        results: dict[str, Any] = {
            "checkpoints": count,
            "checkpoint_bytes": sum(file.stat().st_size for file in weight_files(runs["dcp"][0])),
            "threads": arguments.threads,
            "rounds": arguments.pairs,
            "machine": summary.machine(None),
        }
        measured = {cache: measure(bench, runs, cache, arguments.pairs) for cache in ("hot", "cold")}
    for cache, times in measured.items():
        results[cache] = ratios(times)
    results["times"] = measured
    arguments.results.mkdir(exist_ok=True)
    (arguments.results / "format_speed.json").write_text(json.dumps(results, indent=1) + "\n")
    for cache in ("cold", "hot"):
        for name, found in results[cache].items():
            print(f"{cache} {name}: {found['median']:.2f} ({found['lowest']:.2f}–{found['highest']:.2f})")


if __name__ == "__main__":
    main()
