"""Runs a script in several ranks on CPU as torchrun does, from one process that has imported torch already.

python ranks.py RANKS SCRIPT ARGUMENT…

Each rank of torchrun imports torch anew, which takes longer than what most of our programs do then. Imports
that start threads (Megatron's) do not go with that: a fork has none of them, and waits for ever.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys


def main() -> int:
    """Returns the exit status of the first rank that failed, else 0."""
    ranks, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="imported")  # its imports, once for all ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    running = {_begun(script, rank) for rank in range(ranks)}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return abs(os.waitstatus_to_exitcode(status))
    return 0


def _begun(script: str, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
