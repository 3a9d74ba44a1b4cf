"""How fast a diagnosis streams beside a merge of the same checkpoints, and how much memory each takes.

    python benchmarks/diagnose_speed.py [--checkpoints 10] [--mib 256] [--pairs 5] [--folder DIR]

Takes turns between the streaming part of `pma merge` (reads all, writes one) and `pma diagnose` (reads all,
sums the inner products of each pair), each in a process of its own, hot and cold; prints and writes ratios of
their rates of reading, `benchmarks/results/diagnose_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
from merge_speed import HERE, prepare
from roofline import weight_files

RESULTS = Path(__file__).parent / "results" / "diagnose_speed.json"


def one(what: str, run: Path, out: Path, count: int) -> dict[str, float]:
    """Seconds of the streaming part, without planning, and the process's peak memory."""
    from pma import engine, verbs
    from pma.averaging.inner_products import load_kernel
    from pma.diagnosis.groups import group_of
    from pma.engine.gram import inner_products
    from pma.verbs import Choice, Window

    with verbs.plan(Choice(paths=(run,), window=Window(last=count))) as planned:
        if what == "merge":
            seconds = engine.write(planned, out).stream_seconds
        else:
            load_kernel({spec.dtype for spec in planned.tensors.values()})
            started = time.perf_counter()
            inner_products(planned, group_of)
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def in_a_process(what: str, run: Path, out: Path, count: int) -> dict[str, float]:
    """The same in a process of its own, whose memory is its own."""
    command = [sys.executable, __file__, "--one", what, "--folder", str(run), "--checkpoints", str(count)]
    done = subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(run: Path, out: Path, cache: str, pairs: int, count: int) -> dict[str, object]:
    """Rounds of both in turns: rate of reading of the diagnosis over that of the merge."""
    checkpoints = peers.in_order(run)[-count:]
    rounds: dict[str, list[dict[str, float]]] = {"merge": [], "diagnose": []}
    for number in range(pairs):
        for what in ("merge", "diagnose") if number % 2 else ("diagnose", "merge"):
            prepare(checkpoints, cache)
            rounds[what].append(in_a_process(what, run, out, count))
        merge, diagnose = rounds["merge"][-1], rounds["diagnose"][-1]
        print(
            f"{cache}, {count}: merge {merge['seconds']:.2f} s, diagnose {diagnose['seconds']:.2f} s",
            flush=True,
        )
    ratios = [m["seconds"] / d["seconds"] for m, d in zip(rounds["merge"], rounds["diagnose"], strict=True)]
    return {
        "rate_of_merge": {
            "median": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        },
        "seconds": {what: [round(each["seconds"], 3) for each in found] for what, found in rounds.items()},
        "peak_MiB": {what: round(max(each["peak_MiB"] for each in found)) for what, found in rounds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--one", choices=("merge", "diagnose"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count = arguments.checkpoints
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.folder, arguments.out, count)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="diagnose-speed-") as folder:
        run, out = Path(folder) / "run", Path(folder) / "merged"
        made = [sys.executable, str(HERE / "fixture.py"), str(run), "--checkpoints", str(2 * count)]
        subprocess.run([*made, "--mib", str(arguments.mib)], check=True)
        results: dict[str, object] = {
            "checkpoint_bytes": sum(file.stat().st_size for file in weight_files(peers.in_order(run)[0])),
            "cores": os.cpu_count(),
        }
        for many, cache in ((count, "hot"), (count, "cold"), (2 * count, "hot")):
            results[f"{many}_checkpoints_{cache}"] = compared(run, out, cache, arguments.pairs, many)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
