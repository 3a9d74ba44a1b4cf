"""Converted readers do what every reader must, whatever the source's convention and sharding."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma.conversion import Map, convert, read_template, reader
from pma.conversion.maps import parse_map
from pma.formats import safetensors
from pma.formats.contracts import requests_for
from pma.formats.folder import LocalFolder
from pma.formats.reader import FileReader
from pma.testing.builders import Raw, write_safetensors
from pma.testing.contracts import ReaderContract, read_range, read_whole
from pma.types import Box, DType, Fragment, TensorSpec

# the contract's sample, in an invented trainer's convention
RULES = [
    {"target": "embed.weight", "source": "emb", "view": "columns rows -> rows columns"},
    {
        "target": "layer.{layer}.weight",
        "source": "weights",
        "view": "(pairs two) columns -> (two pairs) columns",
    },
    {"target": "layer.{layer}.bias", "source": "layer_{layer}_norms", "view": "two[1] width -> width"},
    {"target": "layer.{layer}.scale", "source": "layer_{layer}_norms", "view": "two[0] width -> width"},
    {"target": "layer.{layer}.cube", "source": "plane_{plane}_of_{layer}"},
    {"target": "steps", "source": "counts"},
]
CONFIG = {"model_type": "invented", "num_hidden_layers": 1, "plane_count": 4}


def invented(rules: Sequence[Mapping[str, object]] = RULES) -> Map:
    text = json.dumps({"facts": {"planes": "plane_count"}, "rule": list(rules)})
    return parse_map(text.encode(), Path("invented.json"))


def template_at(folder: Path, config: Mapping[str, object] = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def raw(name: str, dtype: DType, values: np.ndarray) -> Raw:
    return Raw(spec=TensorSpec(name=name, dtype=dtype, shape=values.shape), data=values.tobytes())


NUMPY = {DType.BF16: np.uint16, DType.F32: np.uint32, DType.I64: np.uint64}


class ConvertedContract(ReaderContract):
    """Written in the invented convention, read in the sample's."""

    sample = (
        *ReaderContract.sample,
        Raw(
            spec=TensorSpec(name="layer.0.scale", dtype=DType.F32, shape=(16,)),
            data=np.arange(16, dtype=np.float32).tobytes(),
        ),
    )

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        given = {
            t.spec.name: np.frombuffer(t.data, NUMPY[t.spec.dtype]).reshape(t.spec.shape) for t in tensors
        }
        cube, norms = given["layer.0.cube"], np.stack([given["layer.0.scale"], given["layer.0.bias"]])
        stored = [
            raw("emb", DType.BF16, given["embed.weight"].T.copy()),
            raw(
                "weights",
                DType.F32,
                given["layer.0.weight"].reshape(1, 2, 8, 24).swapaxes(1, 2).reshape(1, 16, 24),
            ),
            raw("layer_0_norms", DType.F32, norms),
            *(raw(f"plane_{i}_of_0", DType.BF16, plane.copy()) for i, plane in enumerate(cube)),
            raw("counts", DType.I64, given["steps"]),
        ]
        write_safetensors(folder, stored, shards=2)
        template_at(folder.parent / "like")
        return folder

    def open(self, path: Path) -> reader.ConvertedReader:
        return convert(safetensors.open_reader(path), read_template(path.parent / "like"), invented())


class TestGathered(ConvertedContract):
    """Short runs are read in slabs."""


class TestInPlace(ConvertedContract):
    """Every run is told as it lies in the files."""

    @pytest.fixture(autouse=True)
    def _runs_of_any_length(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader, "_SHORTEST_RUN_BYTES", 0)


class TestSmallSlabs(ConvertedContract):
    """A slab holds a few elements, and no gap is read over."""

    @pytest.fixture(autouse=True)
    def _small_slabs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader, "_SLAB_BYTES", 64)
        monkeypatch.setattr(safetensors.SafetensorsReader, "request_bytes", 32)


class Sharded(FileReader):
    """A reader of one tensor in boxes, each in a file of its own, as distributed checkpoints have them."""

    format = "sharded"

    def __init__(self, folder: Path, values: np.ndarray, cuts: Sequence[Sequence[int]]) -> None:
        self._spec = TensorSpec(name="w", dtype=DType.F32, shape=values.shape)
        self._fragments = []
        edges = [[0, *axis, size] for axis, size in zip(cuts, values.shape, strict=True)]
        folder.mkdir(exist_ok=True)
        for index in np.ndindex(*(len(axis) - 1 for axis in edges)):
            starts = tuple(axis[i] for axis, i in zip(edges, index, strict=True))
            stops = tuple(axis[i + 1] for axis, i in zip(edges, index, strict=True))
            part = values[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]
            name = "-".join(map(str, index)) + ".bin"
            (folder / name).write_bytes(b"head" + part.tobytes())
            sizes = tuple(b - a for a, b in zip(starts, stops, strict=True))
            self._fragments.append(
                Fragment(tensor="w", file=name, offset_bytes=4, length_bytes=part.nbytes, box=(starts, sizes))
            )
        digests = {fragment.file: "" for fragment in self._fragments}
        super().__init__(folder, LocalFolder(folder), digests)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {"w": self._spec}

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        return tuple(self._fragments)


@given(st.data())
def test_sharded_sources_and_boxed_targets(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Rows of groups reordered, from boxes in files, into a box: every layout against numpy."""
    groups, inside, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    values = np.arange(groups * inside * columns, dtype=np.float32).reshape(groups * inside, columns)
    cuts = [sorted(data.draw(st.sets(st.integers(1, size), max_size=2)) - {size}) for size in values.shape]
    expected = values.reshape(groups, inside, columns).transpose(2, 1, 0).reshape(columns, -1)
    starts = tuple(data.draw(st.integers(0, size - 1)) for size in expected.shape)
    sizes = tuple(
        data.draw(st.integers(1, size - start)) for size, start in zip(expected.shape, starts, strict=True)
    )
    inner = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
    folder = tmp_path_factory.mktemp("sharded")
    like = read_template(template_at(folder / "like", {**CONFIG, "plane_count": groups}))
    rules = [{"target": "t", "source": "w", "view": "(planes within) columns -> columns (within planes)"}]
    box: Box = (starts, sizes)
    for shortest in (2**16, 0):
        with (
            pytest.MonkeyPatch.context() as patch,
            closing(convert(Sharded(folder / "data", values, cuts), like, invented(rules))) as found,
        ):
            patch.setattr(reader, "_SHORTEST_RUN_BYTES", shortest)
            start, stop = 0, math.prod(sizes)
            for _ in range(3):
                into = bytearray(4 * (stop - start))
                runs = found.runs("t", start, stop, box)
                found.read_many(requests_for(runs, 4, memoryview(into)))
                assert bytes(into) == expected[inner].reshape(-1)[start:stop].tobytes()
                start = data.draw(st.integers(0, math.prod(sizes)))
                stop = data.draw(st.integers(start, math.prod(sizes)))
            assert read_whole(found, "t") == expected.tobytes()


def test_a_transpose_takes_a_slab_of_memory(tmp_path: Path) -> None:
    """A tensor of 64 MiB, transposed, read a tile at a time."""
    values = np.random.default_rng(0).integers(0, 2**16, (2048, 2**14), dtype=np.uint16)
    write_safetensors(tmp_path / "s", [raw("w", DType.BF16, values)])
    rules = [{"target": "t", "source": "w", "view": "rows columns -> columns rows"}]
    like = read_template(template_at(tmp_path / "like"))
    with closing(convert(safetensors.open_reader(tmp_path / "s"), like, invented(rules))) as found:
        tile = 2**16  # elements, 128 KiB
        transposed = values.T.reshape(-1)
        tracemalloc.start()
        for start in (0, 5 * tile + 12345, values.size - tile):
            read = np.frombuffer(read_range(found, "t", start, start + tile), np.uint16)
            assert np.array_equal(read, transposed[start : start + tile])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # a slab of 4 MiB and indices of a tile's elements, not the tensor
    assert peak < 16 * 2**20


def test_layouts_are_alike_after_the_same_conversion_only(tmp_path: Path) -> None:
    write = TestGathered().write
    paths = [write(tmp_path / str(number) / "s", ConvertedContract.sample) for number in range(2)]
    opened = [TestGathered().open(path) for path in paths]
    renamed = [{**rule, "target": f"other.{rule['target']}"} for rule in RULES]
    other = convert(
        safetensors.open_reader(paths[0]), read_template(paths[0].parent / "like"), invented(renamed)
    )
    assert opened[0].layout_digest == opened[1].layout_digest
    assert opened[0].layout_digest not in (other.layout_digest, opened[0].inner.layout_digest)
