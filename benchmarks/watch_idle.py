"""What a watch costs while nothing lands: CPU time of the process over a minute, as a share of one core.

python benchmarks/watch_idle.py [--checkpoints 500] [--seconds 60] [--poll 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
    result = {
        "checkpoints": asked.checkpoints,
        "poll_seconds": asked.poll,
        "looks": looks,
        "milliseconds_a_look": 1000 * used / looks,
        "share_of_a_core": used / took,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
