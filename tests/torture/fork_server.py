"""A process that has everything imported and compiled, and forks one merge or sweep for each line it is
given, to kill it. Run as a script; see `test_kills.py`.

A line: {"sources", "schemes", "outs", "threads", "kill_after_seconds"}. The answer: {"killed", "seconds"},
and of one that was not killed {"bytes_resumed"} or {"error"}.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from checks import write_those_missing

import pma.engine.compute
from pma import engine, trajectory
from pma.engine import MergeOptions
from pma.formats.folder_writer import FolderPart

SLOWER_SECONDS = 0.005  # a write: the stream is where most kills shall fall, and journals be written


def slow_down(seconds: float = SLOWER_SECONDS) -> None:
    """Let every write take a while."""
    write = FolderPart.write

    def slow(part: FolderPart, file: str, offset_bytes: int, values: memoryview) -> None:
        write(part, file, offset_bytes, values)
        time.sleep(seconds)

    FolderPart.write = slow  # type: ignore[method-assign]


def _merge(job: dict[str, Any]) -> int:
    points = trajectory.from_checkpoints([Path(path) for path in job["sources"]]).points
    options = [MergeOptions(scheme=scheme, threads=job["threads"]) for scheme in job["schemes"]]
    plans = [engine.plan(points, one) for one in options]
    targets = [(plan, Path(out)) for plan, out in zip(plans, job["outs"], strict=True)]
    resumed = write_those_missing(targets, save_seconds=0.01)
    for plan in plans:
        plan.close()
    return resumed


def _forked(job: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            answer: dict[str, Any] = {"bytes_resumed": _merge(job)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    if job["kill_after_seconds"] is not None:
        time.sleep(job["kill_after_seconds"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = os.read(reading, 65536)
    os.close(reading)
    seconds = time.monotonic() - started
    return {"killed": os.WIFSIGNALED(status), "seconds": seconds, **(json.loads(said) if said else {})}


def main() -> None:
    warm = json.loads(sys.stdin.readline())
    _merge(warm)
    slow_down()
    assert threading.active_count() == 1  # a fork copies only the thread that calls it
    print(json.dumps({"ready": pma.engine.compute.__name__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
