"""A process that has everything imported and compiled, and forks the ranks of one merge for each line it is
given, to kill some. Run as a script; see `test_together.py`.

A line: {"sources", "out", "size", "kills": {rank: seconds}, "once": path, "all_after": seconds or null,
"silent_seconds", "staging", which an output in a store needs}. `once`, where there is one: the seconds of the
kills count from when that file exists. `all_after`: then every other rank is killed too, as launchers do.
The answer: {"killed": ranks, "seconds", "outcomes": {rank: bytes resumed, or what it failed with}}. In the
first line, which is for warming up: "slower_seconds", of each write, and "driver", of a store, or null.
"""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from checks import write_those_missing
from fork_server import slow_down

from pma import engine, trajectory
from pma.engine import Crew, MergeOptions
from pma.errors import PmaError
from pma.remote import location


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


def _await(path: Path, children: dict[int, tuple[int, int]]) -> None:
    """Until it exists, or a rank has ended."""
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not path.exists() and not any(os.waitid(os.P_PID, child, ended) for child, _ in children.values()):
        time.sleep(0.01)


def _carried_out(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    children = {rank: _forked(job, rank) for rank in range(job["size"])}
    killed: dict[int, bool] = {}

    def kill(rank: int) -> None:
        if rank not in killed:
            os.kill(children[rank][0], signal.SIGKILL)
            # at once, as launchers do: one that is not waited for looks to the others as if it lived
            killed[rank] = os.WIFSIGNALED(os.waitpid(children[rank][0], 0)[1])

    kills_from = started
    if "once" in job:
        _await(Path(job["once"]), children)
        kills_from = time.monotonic()
    for seconds, rank in sorted((seconds, int(rank)) for rank, seconds in job["kills"].items()):
        time.sleep(max(kills_from + seconds - time.monotonic(), 0))
        kill(rank)
    if job["all_after"] is not None:
        time.sleep(job["all_after"])
        for rank in children:
            kill(rank)
    outcomes = _outcomes(children)
    seconds = time.monotonic() - started
    return {"killed": [rank for rank in killed if killed[rank]], "outcomes": outcomes, "seconds": seconds}


def _outcomes(children: dict[int, tuple[int, int]]) -> dict[int, Any]:
    outcomes = {}
    for rank, (child, reading) in children.items():
        with suppress(ChildProcessError):  # waited for when it was killed
            os.waitpid(child, 0)
        said = os.read(reading, 65536)
        os.close(reading)
        if said:
            outcomes[rank] = json.loads(said)
    return outcomes


def main() -> None:
    warm = json.loads(sys.stdin.readline())
    _rank(warm, 0)
    if warm["driver"] is not None:
        import_module(warm["driver"])  # of a store: a second that every rank would need
    slow_down(warm["slower_seconds"])
    print(json.dumps({"ready": True, "killed": [], "outcomes": {}}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_carried_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
