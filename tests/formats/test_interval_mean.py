"""Stored means: their record, their place, and that nothing takes them for checkpoints or for shards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file

from pma import formats, trajectory
from pma.errors import FormatError, IncompleteError, MismatchError
from pma.formats import interval_mean
from pma.formats.contracts import CheckpointReader
from pma.formats.interval_mean import IntervalMean
from pma.formats.mean_reader import MeanReader
from pma.formats.safetensors import open_reader
from pma.testing import Raw, ReaderContract, store_mean, tiny_run
from pma.testing.builders import _torch_tensor, write_safetensors
from pma.testing.contracts import SAMPLE
from pma.types import DType

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
RECORD = IntervalMean(first_step=101, last_step=125, updates=25, every=1, averaged="masters")
VALUES = json.loads(RECORD.to_json())


def test_a_record_reads_back() -> None:
    assert VALUES == {
        "version": 1, "first_step": 101, "last_step": 125, "updates": 25, "every": 1, "averaged": "masters",
    }  # fmt: skip
    assert IntervalMean.from_json(RECORD.to_json(), "here") == RECORD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": 0}, "at least 1"),
        ({"updates": -3}, "updates is -3, expected a count"),
        ({"updates": 26}, "do not fit in steps 101 to 125"),
        ({"updates": 10**30}, "expected a count"),
        ({"updates": 25.0}, "expected a count"),
        ({"updates": True}, "expected a count"),
        ({"updates": "25"}, "expected a count"),
        ({"updates": None}, "expected a count"),
        ({"every": 0}, "at least 1"),
        ({"every": 5}, "25 updates, every 5 steps, do not fit"),
        ({"first_step": 126}, "before its first"),
        ({"first_step": -1}, "first_step is -1"),
        ({"averaged": "gradients"}, "'gradients', expected one of masters, weights, rounded weights"),
        ({"averaged": ["weights"]}, "expected one of"),
        ({"averaged": "\x1b[2J"}, r"averaged is '\\x1b\[2J', expected"),
        ({"version": 2}, "version 2, expected 1"),
        ({"version": True}, "version True, expected 1"),
        ({"note": "\x1b[2J"}, "note is not known"),
    ],
)
def test_records_that_lie_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"^here: .*{message}"):
        IntervalMean.from_json(json.dumps({**VALUES, **change}), "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "a JSON list"),
        ('{"version": 1}', "averaged is missing"),
        ('{"version": 1, "version": 1}', "occurs twice"),
        (" " * 70_000, "not believable"),
        ("[" * 60_000, "not valid JSON"),
    ],
)
def test_damaged_records_are_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        IntervalMean.from_json(text, "here")


def test_a_mean_is_found_in_or_beside_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    assert interval_mean.find(folder) is None
    assert interval_mean.find(tmp_path / "nothing") is None
    stored = store_mean(folder, {"w": np.ones(3)})
    assert interval_mean.find(folder) == stored == folder / "pma_interval_mean.safetensors"
    assert interval_mean.read_record(stored).last_step == 10
    file = tmp_path / "model_000100.pt"
    file.touch()
    beside = store_mean(file, {"w": np.ones(3)})
    assert interval_mean.find(file) == beside == tmp_path / "model_000100.pma_interval_mean.safetensors"


def store_sharded(checkpoint: Path, tensors: dict[str, torch.Tensor], record: str | None) -> Path:
    folder = checkpoint / "pma_interval_mean"
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    if record is not None:
        (folder / "pma_interval_mean.json").write_text(record)
    return folder


def test_a_folder_counts_once_its_record_is_there_and_two_means_are_one_too_many(tmp_path: Path) -> None:
    [checkpoint] = tiny_run(tmp_path, steps=1)
    folder = store_sharded(checkpoint, {"w": torch.ones(3)}, None)
    assert interval_mean.find(checkpoint) is None
    (folder / "pma_interval_mean.json").write_text(RECORD.to_json())
    assert interval_mean.find(checkpoint) == folder
    assert interval_mean.read_record(folder) == RECORD
    store_mean(checkpoint, {"w": np.ones(3)})
    with pytest.raises(FormatError, match=r"holds both pma_interval_mean\.safetensors and"):
        interval_mean.find(checkpoint)


def test_a_file_without_a_record_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pma_interval_mean.safetensors"
    save_file({"w": np.ones(3, np.float32)}, path)
    with pytest.raises(FormatError, match="pma_interval_mean in its header is missing"):
        interval_mean.read_record(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IncompleteError, match="cut short"):
        interval_mean.read_record(path)


def as_safetensors(folder: Path) -> None:
    tiny_run(folder, steps=1, shards=2)


def as_dcp(folder: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder / "checkpoint-10", no_dist=True)


def as_bin(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    torch.save({"w": torch.ones(3)}, folder / "checkpoint-10" / "pytorch_model.bin")


def as_litgpt(folder: Path) -> None:
    (folder / "step-10").mkdir()
    torch.save({"model": {"w": torch.ones(3)}}, folder / "step-10" / "lit_model.pth")


@pytest.mark.parametrize("write", [as_safetensors, as_dcp, as_bin, as_litgpt])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_mean_in_a_checkpoint_changes_nothing_about_it(write: Any, sharded: bool, tmp_path: Path) -> None:
    write(tmp_path)
    [checkpoint] = tmp_path.iterdir()
    before, side_files = open_formats(checkpoint)
    if sharded:
        stored = store_sharded(checkpoint, {"w": torch.ones(3)}, RECORD.to_json())
    else:
        stored = store_mean(checkpoint, {"w": np.ones(3)})
    assert open_formats(checkpoint) == (before, side_files)
    assert not formats.is_checkpoint(stored)
    assert formats.named_step(stored.name) is None
    with pytest.raises(FormatError, match="name the checkpoint, or the run"):
        formats.open_checkpoint(stored)


def open_formats(checkpoint: Path) -> tuple[tuple[Any, ...], list[str]]:
    reader = formats.open_checkpoint(checkpoint)
    files = [identity.name for identity in reader.identities()]
    return (reader.format, files, reader.ignored_files, dict(reader.tensors)), sorted(reader.side_files())


def test_a_mean_beside_a_file_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save({"w": torch.ones(3)}, tmp_path / f"model_{step:06d}.pt")
        (tmp_path / f"meta_{step:06d}.json").write_text(json.dumps({"step": step}))
        store_mean(tmp_path / f"model_{step:06d}.pt", {"w": np.ones(3)})
    for pattern in (None, r"model_(?P<step>\d+)\..*"):
        found = trajectory.discover([tmp_path], pattern)
        assert [point.path.name for point in found.points] == ["model_000100.pt", "model_000200.pt"]
        assert found.left_out == ()
    assert not formats.is_checkpoint(tmp_path)


def test_a_folder_with_nothing_but_a_mean_is_no_checkpoint(tmp_path: Path) -> None:
    store_mean(tmp_path, {"w": np.ones(3)}, first_step=1, last_step=10)
    assert not formats.is_checkpoint(tmp_path)


FLOATS = [raw for raw in SAMPLE if raw.spec.dtype.kind == "float"]


class TestMeanReader(ReaderContract):
    """Two tensors come from the mean, the others, an integer one among them, from the checkpoint."""

    sample = tuple(raw for raw in SAMPLE if raw.spec.dtype is not DType.BF16)

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        others = [raw for raw in tensors if raw.spec.dtype.kind != "float"]
        halves = [
            Raw(spec=type(r.spec)(name=r.spec.name, dtype=DType.F16, shape=r.spec.shape), data=b"")
            for r in tensors
            if r.spec.dtype.kind == "float"
        ]
        zeros = [Raw(spec=raw.spec, data=bytes(raw.spec.length_bytes)) for raw in halves]
        write_safetensors(folder / "checkpoint-10", [*zeros, *others])
        means = {r.spec.name: _torch_tensor(r).numpy() for r in tensors if r.spec.dtype.kind == "float"}
        store_mean(folder / "checkpoint-10", means)
        return folder / "checkpoint-10"

    def open(self, path: Path) -> CheckpointReader:
        inner = open_reader(path)
        mean = interval_mean.find(path)
        assert mean is not None
        names = [name for name, spec in inner.tensors.items() if spec.dtype.kind == "float"]
        return MeanReader(inner, interval_mean.open_reader(mean), names)


class TestShardedMeanReader(TestMeanReader):
    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        path = super().write(folder, tensors)
        (path / "pma_interval_mean.safetensors").unlink()
        floats = {r.spec.name: _torch_tensor(r) for r in tensors if r.spec.dtype.kind == "float"}
        store_sharded(path, floats, RECORD.to_json())
        return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.ones(4)}, "lacks b, which the checkpoint holds"),
        ({"a": np.ones(4), "b": np.ones(3), "c\x1b": np.ones(1)}, r"holds c\\x1b, which the checkpoint"),
        ({"a": np.ones(4), "b": np.ones(2)}, r"b in the interval mean of .*: shape \(2,\), expected \(3,\)"),
        ({"../a": np.ones(4), "b": np.ones(3)}, "holds ../a, which"),
    ],
)
def test_a_mean_of_other_tensors_is_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4), "b": torch.ones(3)}, tmp_path / "model_10.pt")
    stored = store_mean(tmp_path / "model_10.pt", tensors)
    inner = formats.open_checkpoint(tmp_path / "model_10.pt")
    with pytest.raises(MismatchError, match=message):
        MeanReader(inner, interval_mean.open_reader(stored), ["a", "b"])


def test_a_mean_that_is_not_fp32_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "model_10.pt")
    stored = tmp_path / "model_10.pma_interval_mean.safetensors"
    save_file({"a": np.ones(4, np.float16)}, stored)
    inner = formats.open_checkpoint(tmp_path / "model_10.pt")
    with pytest.raises(MismatchError, match="dtype F16, expected F32"):
        MeanReader(inner, interval_mean.open_reader(stored), ["a"])


def test_shards_have_the_models_own_names(tmp_path: Path) -> None:
    state = {"embed": torch.ones(4, 2), "b": torch.ones(3)}
    dcp.save({"model": state, "optimizer": state}, checkpoint_id=tmp_path / "step-10", no_dist=True)
    stored = store_sharded(tmp_path / "step-10", state, RECORD.to_json())
    reader = formats.open_checkpoint(tmp_path / "step-10")
    made = MeanReader(reader, interval_mean.open_reader(stored), ["model.embed", "model.b"])
    assert made.tensors["model.embed"].dtype is DType.F32
    assert {f.file for f in made.fragments("model.b")} == {"pma_interval_mean/__0_0.distcp"}


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    tied = torch.ones(4, 2)
    torch.save({"embed": tied, "head": tied, "b": torch.ones(3)}, tmp_path / "model_10.pt")
    stored = store_mean(tmp_path / "model_10.pt", {"embed": np.full((4, 2), 2), "b": np.ones(3)})
    reader = formats.open_checkpoint(tmp_path / "model_10.pt")
    made = MeanReader(reader, interval_mean.open_reader(stored), ["embed", "head", "b"])
    head, embed = made.fragments("head"), made.fragments("embed")
    assert [f.offset_bytes for f in head] == [f.offset_bytes for f in embed]
    assert {f.file for f in head} == {"model_10.pma_interval_mean.safetensors"}
