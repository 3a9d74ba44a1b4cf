"""Every merge of a sweep is the merge that `pma merge` writes, to the bit, from fewer reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pma import engine, sweeping, trajectory
from pma.engine import MergeOptions
from pma.errors import SpaceError, UsageError
from pma.formats.contracts import CheckpointReader, ReadRequest
from pma.formats.safetensors import SafetensorsReader
from pma.quantities import Steps
from pma.sweeping import Grid, Sweep
from pma.testing import tiny_run
from pma.testing.reference import read_all
from pma.types import DType

SCHEMES = ("sma", "wma", "ema:0.1", "ema:0.2", "1-sqrt")
SHAPES = {"a.weight": (300, 70), "b.weight": (999,), "scale": (), "empty": (0, 4)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=16, shapes=SHAPES, shards=2)
    return tmp_path / "run"


@pytest.fixture
def sweep(run: Path) -> Iterator[Sweep]:
    grid = Grid(lasts=(3, 6, 10), everys=(None, Steps(20)), ats=(None, 120), schemes=SCHEMES)
    with sweeping.planned([run], grid, MergeOptions(memory_bytes=2**30)) as planned:
        yield planned


def by_itself(sweep: Sweep, place: int, out: Path) -> Path:
    """The same merge, planned and written alone."""
    alone = sweep.plans[place]
    points = [source.point for source in alone.sources]
    with engine.plan(points, MergeOptions(scheme=alone.options.scheme)) as plan:
        engine.write(plan, out)
    return out


def test_every_result_is_what_merge_writes(sweep: Sweep, tmp_path: Path) -> None:
    written = sweeping.write(sweep, tmp_path / "out")
    assert (
        len({path for _, path in written}) == len({cell.plan for cell in sweep.cells}) < len(sweep.cells) + 1
    )
    for number, (cell, path) in enumerate(written):
        expected = by_itself(sweep, cell.plan, tmp_path / f"alone{number}")
        assert read_all(path) == read_all(expected), cell.name
        assert engine.verify(path, samples=None).findings == ()


def test_results_in_memory_are_the_same(sweep: Sweep, tmp_path: Path) -> None:
    import torch

    seen = []

    def use(number: int, tensors: dict[str, torch.Tensor]) -> None:
        seen.append(number)
        expected = read_all(by_itself(sweep, number, tmp_path / f"alone{number}"))
        for name, tensor in tensors.items():
            assert tensor.flatten().view(torch.uint8).numpy().tobytes() == bytes(expected[name]["data"])

    engine.sweep_in_memory(sweep.plans, use)
    assert sorted(seen) == list(range(len(sweep.plans)))


def test_digests_alone_are_the_records(sweep: Sweep, tmp_path: Path) -> None:
    from pma.engine.provenance import load

    digests = engine.sweep_digests(sweep.plans)
    record = load(by_itself(sweep, 3, tmp_path / "alone"))
    expected = {(o["name"], i): d for o in record["outputs"] for i, d in enumerate(o["blake3_chunks"])}
    assert digests[3] == expected


def test_windows_with_the_same_members_share_the_work(run: Path) -> None:
    # every 10 steps is every checkpoint
    with sweeping.planned([run], Grid(lasts=(3,), everys=(None, Steps(10))), MergeOptions()) as sweep:
        assert len(sweep.cells) == 2
        assert len({cell.plan for cell in sweep.cells}) == 1


def test_each_source_is_read_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[Path, int] = {}
    read_many = SafetensorsReader.read_many

    def counted(self: SafetensorsReader, requests: list[ReadRequest]) -> None:
        read[self.path] = read.get(self.path, 0) + sum(len(request.into) for request in requests)
        read_many(self, requests)

    monkeypatch.setattr(SafetensorsReader, "read_many", counted)
    monkeypatch.setattr(SafetensorsReader, "descriptor", lambda *_: None)
    engine.sweep_digests(sweep.plans)
    sizes = {sum(spec.length_bytes for spec in sweep.plans[0].tensors.values())}
    assert set(read.values()) == sizes
    assert engine.bytes_to_read_by(sweep.plans, engine.passes(sweep.plans, in_memory=False)) == sum(
        read.values()
    )


def test_memory_sets_the_number_of_passes(run: Path) -> None:
    grid = Grid(lasts=(3, 6, 10), schemes=SCHEMES)
    for memory_bytes, expected in ((384 * 2**20, 1), (100 * 2**20, 2), (36 * 2**20, 8)):
        with sweeping.planned([run], grid, MergeOptions(memory_bytes=memory_bytes)) as sweep:
            assert len(sweep.plans) == 16
            assert len(engine.passes(sweep.plans, in_memory=False)) == expected
            digests = engine.sweep_digests(sweep.plans)
        if expected == 1:
            reference = digests
        assert digests == reference


def test_results_kept_in_memory_are_budgeted_too(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=6, shapes={"w": (25_000_000,)})
    with sweeping.planned(
        [tmp_path / "run"], Grid(lasts=(2, 3, 4, 5)), MergeOptions(memory_bytes=300 * 2**20)
    ) as sweep:
        assert len(engine.passes(sweep.plans, in_memory=False)) == 1
        assert len(engine.passes(sweep.plans, in_memory=True)) == 2


def test_outputs_that_differ_in_layout_go_in_passes_of_their_own(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=4)
    points = trajectory.from_checkpoints(paths).points
    opened: dict[Path, CheckpointReader] = {}
    plans = [
        engine.plan(points, MergeOptions(dtype=dtype), opened=opened)
        for dtype in (None, DType.F32, None, DType.F32)
    ]
    assert engine.passes(plans, in_memory=False) == [[0, 2], [1, 3]]
    for reader in opened.values():
        reader.close()


def test_a_repeated_or_wider_sweep_writes_only_what_is_new(run: Path, tmp_path: Path) -> None:
    for schemes in (("sma",), ("sma",), ("sma", "wma")):
        with sweeping.planned([run], Grid(lasts=(3, 6), schemes=schemes), MergeOptions()) as sweep:
            before = {p: p.stat().st_ino for p in (tmp_path / "out").glob("*")}
            sweeping.write(sweep, tmp_path / "out")
            after = {p: p.stat().st_ino for p in (tmp_path / "out").glob("*")}
            assert before.items() <= after.items()
            assert len(after) == 2 * len(schemes)


def test_a_folder_in_the_way_is_not_touched(run: Path, tmp_path: Path) -> None:
    with sweeping.planned([run], Grid(lasts=(3,)), MergeOptions()) as sweep:
        precious = tmp_path / "out" / sweep.cells[0].name
        precious.mkdir(parents=True)
        with pytest.raises(UsageError, match="exists already"):
            sweeping.write(sweep, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*")) == [precious]


def test_room_is_needed_for_all_of_them(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    with sweeping.planned([run], Grid(lasts=(3, 6)), MergeOptions()) as sweep:
        each = sweep.plans[0].bytes_to_write
        usage = shutil._ntuple_diskusage(10**9, 10**9, int(each * 1.5))  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(SpaceError):
            sweeping.write(sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_that_do_not_exist_are_told_and_the_rest_done(run: Path) -> None:
    with sweeping.planned([run], Grid(lasts=(3, 99)), MergeOptions()) as sweep:
        assert [cell.last for cell in sweep.cells] == [3]
        assert "--last 99: there are only 16" in sweep.skipped[0]
    none = sweeping.planned([run], Grid(lasts=(99,)), MergeOptions())
    with pytest.raises(UsageError, match="no window of the sweep exists"), none:
        pass
