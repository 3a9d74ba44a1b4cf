"""Ten checkpoints of 671e9 parameters, 1.3 TB each in 163 shards: a plan takes seconds and little memory, and
a part of a shard can be streamed.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from pma import engine, trajectory
from pma.engine.blocks import Block
from pma.testing import giant_run, random_raw
from pma.testing.giant import SHARDS, giant_tensors
from pma.testing.reference import decoded, encoded
from pma.types import DType

CHECKPOINTS = 10
MOST_PEAK_MIB = 600
MOST_PLAN_SECONDS = 15
PLACE_BYTES = 4096

# a small process between: a child's peak counts what its parent held when it was started
MEASURE = """
import json, os, subprocess, sys, time
start = time.monotonic()
child = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "wb"))
_, status, usage = os.wait4(child.pid, 0)
seconds = time.monotonic() - start
status = os.waitstatus_to_exitcode(status)
print(json.dumps({"status": status, "seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}))
"""

# keeps each block it is given as a file named for its place, and prints digests
STREAM = """
import json, sys
from pathlib import Path
from pma import engine, trajectory
from pma.engine.stream import Output, stream
from pma.engine.work import work_of

class Kept:
    def write(self, file, offset_bytes, values):
        (Path(sys.argv[2]) / f"{file}@{offset_bytes}").write_bytes(values)
    def sync(self): ...
    def close(self): ...

numbers = json.loads(sys.argv[3])
output = Output(part=Kept())
with engine.plan(trajectory.discover([Path(sys.argv[1])]).points) as plan:
    stream(work_of(plan), [output], numbers=numbers)
print(json.dumps({f"{file}@{chunk}": digest for (file, chunk), digest in output.digests.items()}))
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    value: dict[str, object]
    seconds: float
    peak_mib: float


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("giant")
    giant_run(folder, CHECKPOINTS)
    yield folder
    shutil.rmtree(folder)  # pytest would keep it, and its apparent size surprises whoever meets it


def measured(command: list[str], stdout: Path) -> Measured:
    """What a command printed as JSON in a process of its own, and what it took."""
    launched = [sys.executable, "-c", MEASURE, str(stdout), *command]
    printed = subprocess.run(launched, check=True, capture_output=True, text=True, timeout=200).stdout
    cost = json.loads(printed)
    assert cost["status"] == 0
    value = json.loads(stdout.read_bytes())
    return Measured(value=value, seconds=cost["seconds"], peak_mib=cost["peak_mib"])


def show(text: str) -> None:
    print(text)  # noqa: T201  # figures, for `pytest -s`


def test_it_has_the_size_of_the_real_one_and_takes_no_room(run: Path) -> None:
    parameters = sum(spec.element_count for spec in giant_tensors())
    show(f"{parameters} parameters in {len(giant_tensors())} tensors")
    assert parameters == pytest.approx(671e9, rel=0.01)
    checkpoints = list(run.iterdir())
    assert len(checkpoints) == CHECKPOINTS
    for checkpoint in checkpoints:
        assert len(list(checkpoint.glob("model-*.safetensors"))) == SHARDS
        assert 1.3e12 < sum(file.stat().st_size for file in checkpoint.iterdir()) < 1.4e12
    disk_bytes = sum(file.stat().st_blocks * 512 for file in run.glob("*/*"))
    show(f"{disk_bytes / 1e6:.1f} MB on disk")
    assert disk_bytes < 110e6  # headers and indexes; about 102 MB in blocks of 4 KiB


@pytest.mark.parametrize("flags", [[], ["--exclude", "*.experts.*"]])
def test_a_plan_is_quick_and_small(run: Path, tmp_path: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "pma", "plan", str(run), "--last", str(CHECKPOINTS), "--json", *flags]
    plan = measured(command, tmp_path / "plan.json")
    show(f"plan {flags}: {plan.seconds:.1f} s, {plan.peak_mib:.0f} MiB")
    assert plan.seconds < MOST_PLAN_SECONDS
    assert plan.peak_mib < MOST_PEAK_MIB
    kept = [s for s in giant_tensors() if not flags or ".experts." not in s.name]
    assert plan.value["bytes_to_read"] == CHECKPOINTS * sum(s.length_bytes for s in kept)
    assert plan.value["parameters"] == sum(s.element_count for s in kept)


def test_a_part_of_a_shard_is_streamed(run: Path, tmp_path: Path) -> None:
    numbers, blocks = ten_blocks(run)
    means = with_values_in_three_checkpoints(run, blocks)
    kept = tmp_path / "blocks"
    kept.mkdir()
    command = [sys.executable, "-c", STREAM, str(run), str(kept), json.dumps(numbers)]
    streamed = measured(command, tmp_path / "digests.json")
    show(f"ten blocks: {streamed.seconds:.1f} s, {streamed.peak_mib:.0f} MiB")
    assert streamed.peak_mib < MOST_PEAK_MIB
    assert len(streamed.value) == len(list(kept.iterdir())) == len(blocks)
    for block, mean in zip(blocks, means, strict=True):
        file, chunk = block.chunk
        assert (kept / f"{file}@{block.offset_bytes}").read_bytes() == mean
        assert streamed.value[f"{file}@{chunk}"] == blake3(mean).hexdigest()
    untouched = [mean for mean in means if not any(mean)]
    assert 1 <= len(untouched) < len(means)  # zeros average to zeros


def ten_blocks(run: Path) -> tuple[list[int], list[Block]]:
    """Numbers of ten neighbouring blocks of one shard in the middle of the output, and the blocks."""
    with engine.plan(trajectory.discover([run]).points) as plan:
        parts = [one for part in plan.partition(SHARDS) for one in part.ranges]
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, len(plan.blocks))
        numbers = list(parts[SHARDS // 2][100:110])
        blocks = [plan.blocks[number] for number in numbers]
    assert len({block.file for block in blocks}) == 1
    return numbers, blocks


def with_values_in_three_checkpoints(run: Path, blocks: list[Block]) -> list[bytes]:
    """Write known values into the sparse shards at four places; returns the average of each block, by numpy.

    The output is laid out as its sources are, so that an offset means the same in both.
    """
    shards = [run / f"checkpoint-{number * 1000}" / blocks[0].file for number in (1, 4, 10)]
    start, stop = blocks[0].offset_bytes, blocks[-1].offset_bytes + blocks[-1].length_bytes
    across_blocks, across_tensors = blocks[2].offset_bytes - 1000, inner_boundary(shards[0], start) - 500
    offsets = sorted([start, across_blocks, across_tensors, stop - PLACE_BYTES])
    assert all(after - before >= PLACE_BYTES for before, after in pairwise(offsets))
    expected = bytearray(stop - start)
    for place, offset in enumerate(offsets):
        total = np.zeros(PLACE_BYTES // 2, np.float32)
        for writer, shard in enumerate(shards):
            data = random_raw("values", DType.BF16, total.shape, seed=10 * place + writer).data
            put(shard, offset, data)
            total += decoded(data, "BF16").astype(np.float32)
        inside = slice(offset - start, offset - start + PLACE_BYTES)
        expected[inside] = encoded(total / np.float32(CHECKPOINTS), "BF16")
    return [bytes(expected[b.offset_bytes - start :][: b.length_bytes]) for b in blocks]


def inner_boundary(shard: Path, offset_bytes: int) -> int:
    """Where the first tensor after `offset_bytes` of a shard begins."""
    with shard.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    starts = [8 + header_bytes + e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"]
    return min(start for start in starts if start > offset_bytes)


def put(file: Path, offset_bytes: int, data: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        assert os.pwrite(descriptor, data, offset_bytes) == len(data)
    finally:
        os.close(descriptor)
