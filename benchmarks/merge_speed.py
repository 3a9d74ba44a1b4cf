"""How fast a merge streams, beside plain positional reads and writes of the same bytes with as many threads.

    python benchmarks/merge_speed.py [--checkpoints 10] [--mib 256] [--threads 2] [--pairs 5] [--folder DIR]

Makes sharded bf16 checkpoints laid out like a small Llama, then takes turns: plain reads of every source and
writes of the output, then the merge's streaming part (digests included; planning and final syncs left out on
both sides). Prints times, medians of the ratios and the merge's peak memory, cold (page cache dropped for the
files) and hot; writes `benchmarks/results/merge_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pma import engine, trajectory
from pma.engine import MergeOptions, Plan
from pma.engine.stream import stream
from pma.formats.safetensors import SafetensorsWriter
from pma.testing import tiny_run
from pma.testing.builders import write_trainer_state

RESULTS = Path(__file__).parent / "results" / "merge_speed.json"
REQUEST_BYTES = 8 * 2**20


def checkpoints(folder: Path, count: int, mib: int) -> list[Path]:
    """`count` checkpoints of about `mib` MiB in two shards: the first of random values, the others copies."""
    layers = max(1, (mib - 16) // 26)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8192, 1024)}
    for layer in range(layers):
        for name, shape in {"self_attn.qkv": (3072, 1024), "self_attn.o": (1024, 1024)}.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for name in ("gate", "up", "down"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (2816, 1024)
        shapes[f"model.layers.{layer}.norm.weight"] = (1024,)
    first = tiny_run(folder, steps=1, shapes=shapes, shards=2)[0]
    for number in range(2, count + 1):
        copy = folder / f"checkpoint-{number * 10}"
        shutil.copytree(first, copy)
        write_trainer_state(copy, number * 10)
    return sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[1]))


def drop_from_cache(paths: list[Path]) -> None:
    """Write back and forget the pages of these checkpoints' files."""
    for path in paths:
        for file in path.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def plain(plan: Plan, folder: Path, threads: int) -> float:
    """Seconds to read every source and write as many bytes as the output has, with positional calls only."""
    jobs: list[tuple[Path, int, int]] = []
    for source in plan.sources:
        for file in source.files:
            for start in range(0, file.size_bytes, REQUEST_BYTES):
                jobs.append(
                    (source.point.path / file.name, start, min(REQUEST_BYTES, file.size_bytes - start))
                )
    writer = SafetensorsWriter(folder)
    writer.create(plan.layout)
    part = writer.open_part()
    buffers = [bytearray(REQUEST_BYTES) for _ in range(threads)]
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {job[0] for job in jobs}}

    def work(worker: int) -> None:
        view = memoryview(buffers[worker])
        for path, start, length in jobs[worker::threads]:
            os.preadv(descriptors[path], [view[:length]], start)
        writes = [(f, s) for f in plan.layout.files for s in range(0, f.size_bytes, REQUEST_BYTES)]
        for file, start in writes[worker::threads]:
            part.write(file.name, start, view[: min(REQUEST_BYTES, file.size_bytes - start)])

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    seconds = time.perf_counter() - started
    part.close()
    for descriptor in descriptors.values():
        os.close(descriptor)
    return seconds


def ours(plan: Plan, folder: Path) -> float:
    """Seconds of the merge's streaming part."""
    writer = SafetensorsWriter(folder)
    writer.create(plan.layout)
    part = writer.open_part()
    started = time.perf_counter()
    stream(plan, plan.blocks, part)
    seconds = time.perf_counter() - started
    part.close()
    return seconds


def in_fresh_folder(parent: Path, measure: Callable[[Path], float]) -> float:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        return measure(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    results: dict[str, object] = {
        key: str(value) for key, value in vars(arguments).items() if key != "folder"
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        paths = checkpoints(Path(scratch) / "run", arguments.checkpoints, arguments.mib)
        with engine.plan(
            trajectory.from_checkpoints(paths).points, MergeOptions(threads=arguments.threads)
        ) as plan:
            moved = plan.bytes_to_read + plan.bytes_to_write
            for cache in ("hot", "cold"):
                pairs = []
                for number in range(arguments.pairs + 1):
                    times = []
                    for measure in (lambda f: plain(plan, f, arguments.threads), lambda f: ours(plan, f)):
                        if cache == "cold":
                            drop_from_cache(paths)
                        times.append(in_fresh_folder(Path(scratch), measure))
                    if number:  # the first pair warms up
                        pairs.append(times)
                ratios = [a / b for a, b in pairs]
                results[cache] = {
                    "plain_seconds": [round(a, 3) for a, _ in pairs],
                    "ours_seconds": [round(b, 3) for _, b in pairs],
                    "plain_over_ours_median": round(statistics.median(ratios), 3),
                    "plain_over_ours_range": [round(min(ratios), 3), round(max(ratios), 3)],
                    "ours_GB_per_second_median": round(
                        moved / 1e9 / statistics.median(b for _, b in pairs), 2
                    ),
                }
                print(f"{cache}: {results[cache]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results["bytes_moved"] = moved
    results["peak_MiB_of_this_process"] = round(peak)
    print(f"peak memory of this process: {peak:.0f} MiB (the builder's included)")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
