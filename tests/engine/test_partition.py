"""The blocks of a merge in parts: each once, balanced, few files in two parts, the same every time."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma import engine, trajectory
from pma.engine import MergeOptions, blocks, partition
from pma.engine.blocks import Policy
from pma.engine.partition import BlockBytes
from pma.errors import UsageError
from pma.testing import tiny_run
from pma.types import DType

file_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@st.composite
def moved(draw: st.DrawFn) -> BlockBytes:
    """Files of some blocks each; the last block of a file may be short, any may read little."""
    counts = draw(file_sizes)
    count = sum(counts)
    return BlockBytes(
        read_B=np.array(draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count)), np.int64),
        write_B=np.array(draw(st.lists(st.integers(1, 100), min_size=count, max_size=count)), np.int64),
        first_F=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


@settings(max_examples=150, deadline=None)
@given(moved(), st.integers(1, 50), st.booleans(), st.data())
def test_every_block_is_in_one_part_and_counted(
    moved: BlockBytes, parts: int, whole_files: bool, data: st.DataObject
) -> None:
    count = len(moved.read_B)
    done = data.draw(st.sets(st.integers(0, count - 1)))
    missing = moved.without(done)
    made = partition.partition(missing, parts, whole_files=whole_files)
    assert len(made) == parts
    numbers = [number for part in made for number in part]
    assert len(numbers) == len(set(numbers)) == sum(map(len, made))
    assert set(range(count)) - done <= set(numbers)
    assert sum(part.bytes_to_read for part in made) == missing.read_B.sum()
    assert sum(part.bytes_to_write for part in made) == missing.write_B.sum()
    for part in made:
        assert bool(len(part)) == bool(part.bytes_to_write)
        assert list(part) == sorted(part)
    assert made == partition.partition(missing, parts, whole_files=whole_files)


@settings(max_examples=150, deadline=None)
@given(moved(), st.integers(1, 50))
def test_parts_are_balanced_and_few_files_are_shared(moved: BlockBytes, parts: int) -> None:
    cost_B = moved.read_B + moved.write_B
    share = cost_B.sum() / parts
    made = partition.partition(moved, parts)
    for part in made:
        assert abs(part.bytes_to_read + part.bytes_to_write - share) <= share / 32 + cost_B.max()
    files = [{int(np.searchsorted(moved.first_F, number, side="right")) for number in part} for part in made]
    assert sum(map(len, files)) <= len(moved.first_F) - 1 + parts - 1


@settings(max_examples=150, deadline=None)
@given(moved(), st.integers(1, 12))
def test_whole_files_are_balanced_as_far_as_files_go(moved: BlockBytes, parts: int) -> None:
    made = partition.partition(moved, parts, whole_files=True)
    whole = [range(int(a), int(b)) for a, b in pairwise(moved.first_F)]
    assert sorted((one for part in made for one in part.ranges), key=lambda one: one.start) == whole
    cost_B = moved.read_B + moved.write_B
    largest = max(int(cost_B[one.start : one.stop].sum()) for one in whole)
    for part in made:
        assert part.bytes_to_read + part.bytes_to_write <= cost_B.sum() / parts + largest


def test_a_cut_near_the_end_of_a_file_is_there() -> None:
    """Two files of 100 and 101 blocks: the middle is half a block from where one ends."""
    moved = BlockBytes(
        read_B=np.zeros(201, np.int64), write_B=np.full(201, 10, np.int64), first_F=np.array([0, 100, 201])
    )
    assert [part.ranges for part in partition.partition(moved, 2)] == [(range(100),), (range(100, 201),)]
    third = [part.ranges[0].start for part in partition.partition(moved, 3)]
    assert third == [0, 67, 134]  # no file ends near


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> engine.Plan:
    """Averaged, widened and copied tensors, in small blocks, in several files."""
    for module in (blocks, partition):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    shapes = {"a": (7_000,), "b": (61, 53), "c": (5_003,), "d": (30_000,), "e": (), "f": (9_999,)}
    paths = tiny_run(tmp_path / "run", steps=3, shapes=shapes, shards=3)
    options = MergeOptions(dtype=DType.F32, copy=("d",))
    return engine.plan(trajectory.from_checkpoints(paths).points, options)


def test_bytes_are_those_of_the_blocks(mixed: engine.Plan) -> None:
    """Against the blocks themselves, made one by one."""
    counted = partition.block_bytes(mixed.layout, mixed.tensors, mixed.policies, 3)
    times = {Policy.AVERAGE: 3, Policy.COPY_NEWEST: 1, Policy.ZERO: 0}
    assert len(mixed.blocks) == len(counted.read_B) > 20
    for number, block in enumerate(mixed.blocks):
        read = sum(span.length_in_bytes * times[span.policy] for span in block.spans)
        assert abs(counted.read_B[number] - read) <= 1, number  # rounded to whole bytes at both ends
        assert counted.write_B[number] == block.length_bytes
    assert counted.read_B.sum() == mixed.bytes_to_read
    assert counted.write_B.sum() == mixed.bytes_to_write


def test_what_is_done_is_not_shared_out(mixed: engine.Plan) -> None:
    """The first half is done: both parts are in the second."""
    half = len(mixed.blocks) // 2
    done = [mixed.blocks[number].chunk for number in range(half)]
    parts = mixed.partition(2, done=done)
    assert min(parts[1]) > half
    bytes_moved = [part.bytes_to_read + part.bytes_to_write for part in parts]
    assert max(bytes_moved) < 1.3 * min(bytes_moved)
    assert not any(map(len, mixed.partition(2, done=[block.chunk for block in mixed.blocks])))


def test_a_prediction_is_the_slowest_part_at_the_given_rates(mixed: engine.Plan) -> None:
    parts = mixed.partition(4)
    found = engine.predict(mixed, 4, read_rate=1000, write_rate=10**9, planning_seconds=2.0)
    before = 2 + found.starting_seconds
    assert found.seconds == pytest.approx(before + max(p.bytes_to_read for p in parts) / 1000, abs=1e-3)
    writing = engine.predict(mixed, 4, read_rate=10**9, write_rate=1000)
    most_written = max(part.bytes_to_write for part in parts)
    assert writing.seconds - writing.starting_seconds == pytest.approx(most_written / 1000, abs=1e-3)
    assert found.nodes_idle == 0
    assert 0 < found.files_shared <= 3
    # three files are cut into four, so that each node has one; the largest tensor decides
    assert (found.files, found.files_in_store) == (3, 4)
    in_store = mixed.resharded(4).partition(4, whole_files=True)
    slowest = max(part.bytes_to_read for part in in_store)
    assert found.seconds_to_store == pytest.approx(before + slowest / 1000, abs=1e-3)
    assert [len(part.ranges) for part in in_store] == [1] * 4
    many = engine.predict(mixed, 1000, read_rate=1000, write_rate=1000)
    assert many.nodes_idle >= 1000 - len(mixed.blocks)
    assert 0.2 < found.starting_seconds < 0.5 < 5 < many.starting_seconds < 10
    with pytest.raises(UsageError, match="rates above zero"):
        engine.predict(mixed, 4, read_rate=0, write_rate=1)
