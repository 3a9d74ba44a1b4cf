"""The conformance suites fit formats of other kinds: dim-1 shards, flat partitions, slow remote reads."""

import json
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma.formats.contracts import ReadRequest, requests_for
from pma.formats.folder import LocalFolder
from pma.formats.reader import FileReader
from pma.formats.runs import Runs, runs_of
from pma.testing import Raw, ReaderContract
from pma.types import DType, Fragment, TensorSpec


class PlainReader(FileReader):
    """Fragments listed in a JSON file beside plain binary files: enough to imitate any way of sharding."""

    format = "plain"

    def __init__(self, path: Path, delay: float = 0.0) -> None:
        self._delay = delay
        listing = json.loads((path / "listing.json").read_text())
        self._tensors = {
            t["name"]: TensorSpec(name=t["name"], dtype=DType[t["dtype"]], shape=tuple(t["shape"]))
            for t in listing["tensors"]
        }
        self._fragments = [
            Fragment(**{**f, "box": tuple(map(tuple, f["box"])) if f["box"] else None})
            for f in listing["fragments"]
        ]
        super().__init__(path, LocalFolder(path), {fragment.file: "" for fragment in self._fragments})

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._tensors

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        return tuple(f for f in self._fragments if f.tensor == name)

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            time.sleep(self._delay)
            super().read_many([request])


def save(
    folder: Path, tensors: Sequence[Raw], files: Mapping[str, bytes], fragments: Sequence[Fragment]
) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    specs = [{"name": r.spec.name, "dtype": r.spec.dtype.name, "shape": r.spec.shape} for r in tensors]
    listing = {"tensors": specs, "fragments": [f.__dict__ for f in fragments]}
    (folder / "listing.json").write_text(json.dumps(listing))
    return folder


class TestSlicesAlongTheLastDimension(ReaderContract):
    """As tensor-parallel ranks store them: every rank holds some columns of each tensor."""

    ranks = 3

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        files = dict.fromkeys((f"rank{r}.bin" for r in range(self.ranks)), b"")
        fragments = []
        for raw in tensors:
            whole = np.frombuffer(raw.data, np.uint8).reshape(*raw.spec.shape, raw.spec.dtype.bits // 8)
            cuts = np.linspace(0, raw.spec.shape[-1], self.ranks + 1).astype(int).tolist()
            for rank, (low, high) in enumerate(pairwise(cuts)):
                if low == high:
                    continue
                file = f"rank{rank}.bin"
                data = np.ascontiguousarray(whole[..., low:high, :]).tobytes()
                box = ((*[0] * (len(raw.spec.shape) - 1), low), (*raw.spec.shape[:-1], high - low))
                fragments.append(
                    Fragment(
                        tensor=raw.spec.name,
                        file=file,
                        offset_bytes=len(files[file]),
                        length_bytes=len(data),
                        box=box,
                    )
                )
                files[file] += data
        return save(folder, tensors, files, fragments)

    def open(self, path: Path) -> PlainReader:
        return PlainReader(path)


class TestFlatPartitions(ReaderContract):
    """As ZeRO stores them: all tensors end to end, cut into equal parts wherever that falls."""

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        total = sum(len(raw.data) for raw in tensors)
        part_bytes = -(-total // 3 // 8) * 8
        joined = b"".join(raw.data for raw in tensors)
        files = {f"part{i}.bin": joined[i * part_bytes : (i + 1) * part_bytes] for i in range(3)}
        fragments, position = [], 0
        for raw in tensors:
            start, width = 0, raw.spec.dtype.bits // 8
            while start < len(raw.data):
                part, inside = divmod(position, part_bytes)
                length = min(part_bytes - inside, len(raw.data) - start)
                fragments.append(
                    Fragment(
                        tensor=raw.spec.name,
                        file=f"part{part}.bin",
                        offset_bytes=inside,
                        length_bytes=length,
                        flat_start=start // width,
                    )
                )
                start, position = start + length, position + length
        return save(folder, tensors, files, fragments)

    def open(self, path: Path) -> PlainReader:
        return PlainReader(path)


class TestSlowStore(TestFlatPartitions):
    """As a remote store answers: late."""

    def open(self, path: Path) -> PlainReader:
        return PlainReader(path, delay=0.001)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    starts = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, starts, strict=True))
    return shape, starts, sizes


@given(boxes(), st.data())
def test_any_range_of_any_box(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    shape, starts, sizes = box
    spec = TensorSpec(name="t", dtype=DType.U16, shape=shape)
    whole = np.arange(spec.element_count, dtype=np.uint16).reshape(shape)
    inside = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
    stored = np.ascontiguousarray(whole[inside]).tobytes()
    fragment = Fragment(tensor="t", file="f", offset_bytes=0, length_bytes=len(stored), box=(starts, sizes))
    start = data.draw(st.integers(0, spec.element_count))
    stop = data.draw(st.integers(start, spec.element_count))
    into = np.full(stop - start, 65_535, dtype=np.uint16)
    _fill(into, stored, runs_of(spec, [fragment], start, stop))
    expected = np.full(shape, 65_535, dtype=np.uint16)
    expected[inside] = whole[inside]
    np.testing.assert_array_equal(into, expected.reshape(-1)[start:stop])


@given(boxes(), st.data())
def test_any_range_of_a_box_from_shards_of_any_kind(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    shape, starts, sizes = box
    spec = TensorSpec(name="t", dtype=DType.U16, shape=shape)
    whole = np.arange(spec.element_count, dtype=np.uint16).reshape(shape)
    inside = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
    wanted = whole[inside].reshape(-1)
    if data.draw(st.booleans()) or not shape:  # flat ranges, as ZeRO's partitions
        cut = data.draw(st.integers(0, spec.element_count))
        parts = [whole.reshape(-1)[:cut], whole.reshape(-1)[cut:]]
        places = [{"flat_start": 0}, {"flat_start": cut}]
    else:  # two slices along some dimension
        axis = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, shape[axis]))
        parts = np.split(whole, [cut], axis=axis)
        begins = (0,) * len(shape), tuple(cut if d == axis else 0 for d in range(len(shape)))
        places = [{"box": (begin, part.shape)} for begin, part in zip(begins, parts, strict=True)]
    stored = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    fragments, offset = [], 0
    for part, place in zip(parts, places, strict=True):
        fragments.append(
            Fragment(tensor="t", file="f", offset_bytes=offset, length_bytes=part.nbytes, **place)
        )
        offset += part.nbytes
    start = data.draw(st.integers(0, len(wanted)))
    stop = data.draw(st.integers(start, len(wanted)))
    into = np.full(stop - start, 65_535, dtype=np.uint16)
    _fill(into, stored, runs_of(spec, fragments, start, stop, (starts, sizes)))
    np.testing.assert_array_equal(into, wanted[start:stop])


def _fill(into: np.ndarray, stored: bytes, runs: Runs) -> None:
    assert list(runs.first_R) == sorted(runs.first_R)
    for request in requests_for(runs, into.itemsize, memoryview(into.view(np.uint8))):
        request.into[:] = stored[request.offset_bytes : request.offset_bytes + len(request.into)]


def test_the_suites_notice_a_wrong_reader(tmp_path: Path) -> None:
    class OffByOne(PlainReader):
        def read_many(self, requests: Sequence[ReadRequest]) -> None:
            super().read_many(requests)
            for request in requests:
                if len(request.into):
                    request.into[0] ^= 1

    class Broken(TestFlatPartitions):
        def open(self, path: Path) -> PlainReader:
            return OffByOne(path)

    suite = Broken()
    path = suite.write(tmp_path / "checkpoint", suite.sample)
    with pytest.raises(AssertionError):
        suite.test_reads_what_was_written(path)
