"""How a hostile checkpoint is refused: by which error, how fast, in how much memory. Measured in a fresh
process, because memory that tests have used hides what a reader needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

#: what the library promises of every refusal
MOST_SECONDS = 1.0
MOST_EXTRA_BYTES = 64 * 2**20

_PROGRAM = """
import json, re, sys, time
from pathlib import Path
from pma import errors, formats
path = Path(sys.argv[1])
formats.is_checkpoint(path)
formats.named_step(path.name)
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")
before, started = kilobytes("VmRSS"), time.process_time()
try:
    reader = formats.open_checkpoint(path)
    formats.plan_layout(reader.tensors, reader)
    error, kind = "", ""
except errors.InputError as found:
    error, kind = str(found), type(found).__name__
seconds = time.process_time() - started
extra = (kilobytes("VmHWM") - before) * 1024
print(json.dumps({"error": error, "kind": kind, "seconds": seconds, "extra_bytes": extra}))
"""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """`error` is empty where the checkpoint was accepted. `seconds`: of processor time, so that a busy
    machine does not count; `extra_bytes`: peak memory above the idle process's.
    """

    error: str
    kind: str
    seconds: float
    extra_bytes: int


def refusal(path: Path, timeout_seconds: float = 60.0) -> Refusal:
    """Open the checkpoint at `path` in a process of its own and plan a copy of it."""
    command = [sys.executable, "-c", _PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Refusal(**json.loads(done.stdout))


def assert_refused(path: Path, *words: str) -> None:
    """`path` is refused within the promised time and memory, by an error that has `words` in it."""
    found = refusal(path)
    assert found.error, f"{path} was accepted"
    for word in words:
        assert word in found.error, found.error
    assert found.seconds < MOST_SECONDS, found
    assert found.extra_bytes < MOST_EXTRA_BYTES, found
