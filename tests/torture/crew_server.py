"""A process that has everything imported and compiled, and forks the ranks of one merge for each line it is
given, to kill some. Run as a script; see `test_together.py`.

A line: {"sources", "out", "size", "kills": {rank: seconds}, "all_after": seconds or null, "silent_seconds",
"staging", which an output in a store needs}. `all_after`: then every other rank is killed too, as launchers
do. The answer: {"killed": ranks, "seconds",
"outcomes": {rank: bytes resumed, or what it failed with}}.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from checks import write_those_missing
from fork_server import slow_down

from pma import engine, trajectory
from pma.engine import Crew, MergeOptions
from pma.errors import PmaError
from pma.remote import location

# a write: ten chunks among some ranks; they meet first, and most kills shall fall later
SLOWER_SECONDS = 0.03


def _rank(job: dict[str, Any], rank: int) -> Any:
    points = trajectory.from_checkpoints([Path(path) for path in job["sources"]]).points
    with engine.plan(points, MergeOptions(threads=2)) as plan:
        out = location(job["out"])
        if job["size"] == 1 and "staging" not in job:
            return write_those_missing([(plan, out)], save_seconds=0.01)
        crew = None
        if job["size"] > 1:
            how = {"join_seconds": 3 * job["silent_seconds"], "silent_seconds": job["silent_seconds"]}
            crew = Crew(rank=rank, size=job["size"], **how)
        staging = Path(job["staging"]) if "staging" in job else None
        return engine.write(plan, out, crew=crew, save_seconds=0.01, staging=staging).bytes_resumed


def _forked(job: dict[str, Any], rank: int) -> tuple[int, int]:
    """Process, and where it writes what became of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = _rank(job, rank)
        except PmaError as error:
            answer = f"{type(error).__name__}: {error}"
        except BaseException:
            answer = traceback.format_exc()
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    return child, reading


def _carried_out(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    children = {rank: _forked(job, rank) for rank in range(job["size"])}
    deaths = sorted((seconds, int(rank)) for rank, seconds in job["kills"].items())
    for seconds, rank in deaths:
        time.sleep(max(started + seconds - time.monotonic(), 0))
        os.kill(children[rank][0], signal.SIGKILL)
    if job["all_after"] is not None:
        time.sleep(job["all_after"])
        for child, _ in children.values():
            os.kill(child, signal.SIGKILL)
    outcomes, killed = {}, []
    for rank, (child, reading) in children.items():
        _, status = os.waitpid(child, 0)
        said = os.read(reading, 65536)
        os.close(reading)
        if os.WIFSIGNALED(status):
            killed.append(rank)
        if said:
            outcomes[rank] = json.loads(said)
    return {"killed": killed, "seconds": time.monotonic() - started, "outcomes": outcomes}


def main() -> None:
    warm = json.loads(sys.stdin.readline())
    _rank(warm, 0)
    slow_down(SLOWER_SECONDS)
    print(json.dumps({"ready": True, "killed": [], "outcomes": {}}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_carried_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
