"""`torchrun … -m pma merge`: the same bits, one result, restarts, and what a launch without torch says."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from pma import engine, trajectory
from pma.remote import location
from pma.testing import tiny_run

from ..remote.conftest import Bucket, bucket, started_server
from .checks import Weights, check_finished, looks_complete, weights_of

# fixtures
__all__ = ["bucket", "started_server"]

SHAPES = {"a": (5_000_000,), "b": (3_000_001,), "c": (4_900_000,)}  # seven chunks
# a rank that is killed in its part, once; what it wrote is in the journal by then
DYING = """
import os, signal, sys, time
from pathlib import Path
from pma.engine.together import part, writing
from pma.formats.folder_writer import FolderPart
flag, victim = Path(sys.argv.pop()), sys.argv.pop()
write, dies = FolderPart.write, os.environ["RANK"] == victim and not flag.exists()
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
    size: int,
    *arguments: object,
    launcher: tuple[str, ...] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> subprocess.CompletedProcess[str]:
    """`meanwhile` is called again and again until it ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    launched = subprocess.Popen(
        [*command, *launcher, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(launched.communicate, timeout=240)
        while not wait([ended], timeout=0.05).done:
            meanwhile()
    return subprocess.CompletedProcess(launched.args, launched.returncode, *ended.result())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=2)
    return tmp_path / "run"


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> Weights:
    with engine.plan(trajectory.from_checkpoints(sorted(run.iterdir())).points) as plan:
        engine.write(plan, tmp_path / "one")
    return weights_of(tmp_path / "one")


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
    check_finished(tmp_path / "out", weights_of(tmp_path / "one"))


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (4, 0), (4, 1)])
def test_a_killed_rank_is_started_again_by_torchrun(
    run: Path, tmp_path: Path, expected: Weights, size: int, victim: int
) -> None:
    """The restart goes on from the journals; at no moment is there an output that is not whole."""
    script, flag, folder = tmp_path / "dying.py", tmp_path / "died", tmp_path / "work"
    script.write_text(DYING)
    folder.mkdir()
    looks: Counter[bool] = Counter()

    def look() -> None:
        there = (folder / "out").exists()
        complete = [path for path in folder.iterdir() if looks_complete(path)]
        assert there or (folder / "out").exists() or not complete, complete
        if there:
            assert weights_of(folder / "out") == expected
        looks[flag.exists()] += not there

    arguments = ("merge", run, "--last", 3, "--json", "-o", folder / "out", victim, flag)
    done = torchrun(size, script, *arguments, launcher=("--max-restarts=1",), meanwhile=look)
    assert done.returncode == 0, done.stderr[-3000:]
    assert flag.exists()
    assert min(looks[False], looks[True]) > 3  # before it was killed, and after
    assert json.loads(done.stdout.strip().splitlines()[-1])["bytes_resumed"] > 0
    check_finished(folder / "out", expected)
    assert engine.verify(folder / "out", samples=None).findings == ()
    assert list(folder.iterdir()) == [folder / "out"]


def test_three_processes_to_s3(bucket: Bucket, run: Path) -> None:
    """Two files: the same tensors as one process here."""
    done = torchrun(3, "-m", "pma", "merge", run, "--last", 3, "--json", "-o", f"{bucket.url}/out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["bytes_written"] > 0
    assert "re-sharded into 3" in done.stderr
    assert len([name for name in bucket.files("out") if name.endswith(".safetensors")]) == 3
    assert not [name for name in bucket.files("out") if name.startswith(".")]
    assert engine.verify(location(f"{bucket.url}/out"), samples=None).findings == ()
