"""`torchrun … -m pma merge`: the same bits, one result, restarts, and what a launch without torch says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pma import engine
from pma.remote import location
from pma.testing import tiny_run

from ..remote.conftest import Bucket, bucket, started_server

# fixtures
__all__ = ["bucket", "started_server"]

SHAPES = {"a": (5_000_000,), "b": (3_000_001,), "c": (4_900_000,)}  # seven chunks
# a rank that dies in its part once, as by SIGKILL; what it wrote is in the journal by then
DYING = """
import os, signal, sys, time
from pathlib import Path
from pma.engine.together import part, writing
from pma.formats.folder_writer import FolderPart
flag = Path(sys.argv.pop())
write, dies = FolderPart.write, os.environ["RANK"] == "1" and not flag.exists()
def slow(*arguments):
    write(*arguments)
    time.sleep(1.5 if dies else 0.2)
    if dies:
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
FolderPart.write = slow
writing.SAVE_SECONDS = 0.05
from pma.cli import main
main()
"""


def torchrun(
    size: int, *arguments: object, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *launcher, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=2)
    return tmp_path / "run"


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def test_two_processes_give_one_result_of_the_same_bits(run: Path, tmp_path: Path) -> None:
    merge = ("merge", run, "--last", 3, "--scheme", "wma", "--json", "-o")
    alone = subprocess.run(
        [sys.executable, "-m", "pma", *map(str, merge), str(tmp_path / "one")],
        capture_output=True,
        text=True,
        check=True,
    )
    done = torchrun(2, "-m", "pma", *merge, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    told, of_one = json.loads(done.stdout), json.loads(alone.stdout)
    assert told.keys() == of_one.keys()
    assert (told["bytes_read"], told["bytes_written"]) == (of_one["bytes_read"], of_one["bytes_written"])
    assert "rank 1 on " in done.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "one")
    assert engine.verify(tmp_path / "out").findings == ()


def test_a_killed_rank_is_started_again_by_torchrun(run: Path, tmp_path: Path) -> None:
    """Four processes, one of which dies of SIGKILL: the restart goes on from the journals."""
    script, flag = tmp_path / "dying.py", tmp_path / "died"
    script.write_text(DYING)
    arguments = ("merge", run, "--last", 3, "--json", "-o", tmp_path / "out", flag)
    done = torchrun(4, script, *arguments, launcher=("--max-restarts=1",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert flag.exists()
    assert json.loads(done.stdout.strip().splitlines()[-1])["bytes_resumed"] > 0
    assert engine.verify(tmp_path / "out", samples=None).findings == ()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_three_processes_to_s3(bucket: Bucket, run: Path) -> None:
    """Two files: the same tensors as one process here."""
    done = torchrun(3, "-m", "pma", "merge", run, "--last", 3, "--json", "-o", f"{bucket.url}/out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["bytes_written"] > 0
    assert "re-sharded into 3" in done.stderr
    assert len([name for name in bucket.files("out") if name.endswith(".safetensors")]) == 3
    assert not [name for name in bucket.files("out") if name.startswith(".")]
    assert engine.verify(location(f"{bucket.url}/out"), samples=None).findings == ()
