"""Workers end with whoever asked for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pma.studies.workers import pool


def is_alive(process: int) -> bool:
    """Whether it runs; one that ended and was not waited for does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(process: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while is_alive(process):
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.05)


def test_an_interrupt_ends_them_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), pool(1) as workers:  # what interrupts it is in the block
        worker = workers.submit(os.getpid).result()
        workers.submit(time.sleep, 600)
        raise KeyboardInterrupt
    wait_until_gone(worker, seconds=5)


def test_not_even_a_killed_parent_leaves_them_behind(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from pma.studies.workers import pool\n"
        "if __name__ == '__main__':\n"
        "    with pool(1) as workers:\n"
        "        print(workers.submit(os.getpid).result(), flush=True)\n"
        "        workers.submit(time.sleep, 600).result()\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert is_alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until_gone(worker, seconds=10)
