"""What a watch costs while nothing lands: CPU time of the process over a minute, as a share of one core. And
how long after a checkpoint is complete its evaluation begins.

python benchmarks/watch_idle.py [--checkpoints 500] [--seconds 60] [--poll 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pma.evaluation.evaluate import Evaluation
from pma.evaluation.measures import TEXT, Measure
from pma.results import Store
from pma.testing import tiny_run
from pma.trajectory import Growing
from pma.watch import Judge, Wanted, Watch
from pma.watch.page_file import PageFile


def nothing_much(name: str, tensors: Any) -> Evaluation:
    """Stands for an evaluation, which is not what is measured."""
    return Evaluation(
        name=name, text_digest="", context_tokens=1, text_bytes=2, nats=(1.0, 2.0), tokens=(1, 1)
    )


def landed(watch: Watch, run: Path, folder: Path, number: int, asked: argparse.Namespace) -> float:
    """Seconds from the completion of a checkpoint, at some moment of a pause, to its point."""
    every = 10 * (asked.checkpoints + number)
    [made] = tiny_run(folder / f"later-{number}", steps=1, every=every, shapes={"w": (2,)})
    watch.each = 1
    completed: list[float] = []

    def complete() -> None:
        made.rename(run / made.name)
        completed.append(time.monotonic())

    timer = threading.Timer(asked.poll * number / 11, complete)
    timer.start()
    before = len(watch.added)
    while len(watch.added) == before:
        watch.look()
        time.sleep(asked.poll if len(watch.added) == before else 0)
    return time.monotonic() - completed[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--poll", type=float, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        tiny_run(run, steps=asked.checkpoints, shapes={"w": (2,)})
        measure = Measure(name=TEXT, key="none", run=nothing_much, read=Evaluation.from_json)
        watch = Watch(
            Growing(run),
            Wanted(last=10),
            Judge(measures=[measure], load=lambda tensors, like, *, context_tokens: tensors),
            Store(Path(folder) / "results.sqlite"),
            each=25,
            page=PageFile(Path(folder)),
        )
        while watch.look():
            pass
        time.sleep(asked.poll)
        watch.look()
        looks = 0
        used, started = time.process_time(), time.monotonic()
        while time.monotonic() - started < asked.seconds:
            watch.look()
            looks += 1
            time.sleep(asked.poll)
        used, took = time.process_time() - used, time.monotonic() - started
        waits = [landed(watch, run, Path(folder), number, asked) for number in range(1, 11)]
    result = {
        "checkpoints": asked.checkpoints,
        "poll_seconds": asked.poll,
        "looks": looks,
        "milliseconds_a_look": 1000 * used / looks,
        "share_of_a_core": used / took,
        "seconds_until_evaluated": [round(wait, 2) for wait in sorted(waits)],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
