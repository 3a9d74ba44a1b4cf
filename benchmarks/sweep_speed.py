"""What a sweep costs beside one merge: 24 plans over 20 checkpoints, results only hashed.

    python benchmarks/sweep_speed.py [--checkpoints 20] [--mib 256] [--pairs 5] [--folder DIR]

Takes turns between one plan (sma over all checkpoints) and 24 (six windows, four schemes), cold and hot;
prints and writes the ratios of their times, `benchmarks/results/sweep_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
from merge_speed import HERE, prepare
from roofline import weight_files

from pma import engine, sweeping
from pma.engine import MergeOptions
from pma.engine.compute import load_kernels
from pma.sweeping import Grid

RESULTS = Path(__file__).parent / "results" / "sweep_speed.json"
SCHEMES = ("sma", "wma", "ema:0.2", "1-sqrt")


def seconds(run: Path, grid: Grid) -> tuple[float, int, int]:
    """Time to make and hash every merge of the grid, without planning; how many merges, in how many
    passes.
    """
    with sweeping.planned([run], grid, MergeOptions()) as sweep:
        # the raw checkpoints that a sweep compares with are not asked for here
        plans = [sweep.plans[place] for place in sorted({cell.plan for cell in sweep.cells})]
        load_kernels(plans[0].blocks.averaged_types())
        started = time.perf_counter()
        engine.sweep_digests(plans)
        return time.perf_counter() - started, len(plans), len(engine.passes(plans, in_memory=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    count = arguments.checkpoints
    grids = {
        "one": Grid(lasts=(count,)),
        "many": Grid(lasts=tuple(sorted({max(2, count * i // 6) for i in range(1, 7)})), schemes=SCHEMES),
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="sweep-speed-") as folder:
        command = [sys.executable, str(HERE / "fixture.py"), str(Path(folder) / "run")]
        subprocess.run(
            [*command, "--checkpoints", str(count), "--mib", str(arguments.mib)], check=True
        )  # a program of its own, so that its memory is not counted here
        checkpoints = peers.in_order(Path(folder) / "run")
        results: dict[str, object] = {
            "checkpoints": count,
            "checkpoint_bytes": sum(file.stat().st_size for file in weight_files(checkpoints[0])),
            "cores": os.cpu_count(),
        }
        for cache in ("hot", "cold"):
            ratios = []
            for _ in range(arguments.pairs):
                times = {}
                for name, grid in grids.items():
                    prepare(checkpoints, cache)
                    times[name], results[f"plans_{name}"], results[f"passes_{name}"] = seconds(
                        Path(folder) / "run", grid
                    )
                ratios.append(round(times["many"] / times["one"], 2))
                print(f"{cache}: {times['many']:.2f} s / {times['one']:.2f} s = {ratios[-1]}", flush=True)
            results[f"many_over_one_{cache}"] = {
                "median": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
            }
    results["peak_MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
