"""The worked example of the documentation keeps the contract, and works through the entry point."""

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import pma
from pma import formats
from pma.formats.contracts import CheckpointReader
from pma.testing import Raw, ReaderContract, WriterContract, random_raw
from pma.types import DType, Layout, TensorSpec

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_format.py"
SAMPLE = (
    random_raw("embed.weight", DType.F32, (33, 16), seed=1),
    random_raw("norm", DType.F64, (16,), seed=2),
    random_raw("steps", DType.I64, (3,), seed=3),
)
NUMPY = {DType.F32: np.float32, DType.F64: np.float64, DType.I64: np.int64}


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_format", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestReader(ReaderContract):
    sample = SAMPLE

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        folder.mkdir(parents=True)
        for raw in tensors:
            values = np.frombuffer(raw.data, NUMPY[raw.spec.dtype]).reshape(raw.spec.shape)
            np.save(folder / f"{raw.spec.name}.npy", values)
        (folder / "DONE").write_text("\n".join(raw.spec.name for raw in tensors))
        return folder

    def open(self, path: Path) -> CheckpointReader:
        reader: CheckpointReader = example().open_reader(path)
        return reader

    def data_files(self, path: Path) -> list[Path]:
        return sorted(path.glob("*.npy"))


class TestWriter(WriterContract):
    sample = SAMPLE

    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        layout: Layout = example().plan_layout(tensors, None)
        return layout

    def read_back(self, folder: Path) -> dict[str, bytes]:
        return {path.stem: np.load(path).tobytes() for path in folder.glob("*.npy")}


def test_it_is_under_eighty_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80


def test_pma_merges_a_run_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed(EntryPoint):
        def load(self) -> ModuleType:
            return example()

    found = [Installed(name="npy", value="example_format", group="pma.formats")]
    monkeypatch.setattr(formats, "entry_points", lambda group: found if group == "pma.formats" else [])
    for step in (10, 20, 30):
        TestReader().write(
            tmp_path / "run" / f"ckpt-{step}",
            [random_raw("w", DType.F32, (40, 50), seed=step), *SAMPLE],
        )
    (tmp_path / "run" / "ckpt-30" / "DONE").unlink()
    choice = pma.Choice(paths=(tmp_path / "run",), window=pma.Window(last=2))
    pma.merge(choice, tmp_path / "out")
    sources = [np.load(tmp_path / "run" / f"ckpt-{step}" / "w.npy").astype(np.float64) for step in (10, 20)]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "w.npy"), (sum(sources) / 2).astype(np.float32))
    assert (tmp_path / "out" / "DONE").is_file()
    assert pma.verify(tmp_path / "out", samples=None).findings == ()
