"""Conformance suites for formats. Subclass one in a test module, say how your framework writes and reads, and
run pytest:

    class TestMine(ReaderContract):
        def write(self, folder, tensors): ...      # by the framework itself, not by the code under test
        def open(self, path): return my_format.open_reader(path)

Nothing here assumes that a tensor is in one piece, in one file, or on a local disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pma.errors import FormatError, IncompleteError
from pma.formats.contracts import CheckpointReader, ReadRequest, requests_for
from pma.formats.folder_writer import FolderWriter
from pma.testing.builders import Raw, random_raw
from pma.types import DType, Fragment, Layout, TensorSpec

SAMPLE = (
    random_raw("embed.weight", DType.BF16, (33, 16), seed=1),
    random_raw("layer.0.weight", DType.F32, (16, 24), seed=2),
    random_raw("layer.0.bias", DType.F32, (16,), seed=3),
    random_raw("layer.0.cube", DType.BF16, (4, 6, 10), seed=4),
    random_raw("steps", DType.I64, (3,), seed=5),
)


def read_range(reader: CheckpointReader, name: str, start: int, stop: int) -> bytes:
    """Elements `start` to `stop` of a tensor, through the reader's contract."""
    spec = reader.tensors[name]
    into = bytearray((stop - start) * spec.dtype.bits // 8)
    reader.read_many(requests_for(reader.runs(name, start, stop), spec.dtype.bits // 8, memoryview(into)))
    return bytes(into)


def read_whole(reader: CheckpointReader, name: str) -> bytes:
    """A whole tensor, row-major."""
    return read_range(reader, name, 0, reader.tensors[name].element_count)


class ReaderContract:
    """What every `CheckpointReader` must do."""

    #: tensors that the format can hold; a subclass may leave out what it cannot, or add its own
    sample: Sequence[Raw] = SAMPLE

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        """Write a checkpoint with the framework's own code; return what `open` takes."""
        raise AssertionError("a subclass writes")

    def open(self, path: Path) -> CheckpointReader:
        """Open it with the reader under test."""
        raise AssertionError("a subclass opens")

    def data_files(self, path: Path) -> list[Path]:
        """The files that hold tensors' bytes."""
        return sorted(
            p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file() and p.suffix != ".json"
        )

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return self.write(tmp_path / "checkpoint", self.sample)

    def test_tells_names_types_and_shapes(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            found = {name: (spec.dtype, spec.shape) for name, spec in reader.tensors.items()}
        assert found == {raw.spec.name: (raw.spec.dtype, raw.spec.shape) for raw in self.sample}

    def test_fragments_cover_each_element_once(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            for name, spec in reader.tensors.items():
                covered = np.zeros(spec.element_count, dtype=int)
                for fragment in reader.fragments(name):
                    assert fragment.tensor == name
                    assert (fragment.flat_start is None) != (fragment.box is None)
                    if fragment.flat_start is not None:
                        count = fragment.length_bytes * 8 // spec.dtype.bits
                        covered[fragment.flat_start : fragment.flat_start + count] += 1
                    elif fragment.box is not None:
                        starts, sizes = fragment.box
                        inside = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
                        covered.reshape(spec.shape)[inside] += 1
                        assert fragment.length_bytes == int(np.prod(sizes)) * spec.dtype.bits // 8
                assert (covered == 1).all(), name

    def test_reads_what_was_written(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            for raw in self.sample:
                assert read_whole(reader, raw.spec.name) == raw.data, raw.spec.name

    def test_reads_any_range(self, checkpoint: Path) -> None:
        random = np.random.default_rng(0)
        with closing(self.open(checkpoint)) as reader:
            for raw in self.sample:
                width = raw.spec.dtype.bits // 8
                for _ in range(20):
                    start, stop = sorted(random.integers(0, raw.spec.element_count + 1, 2).tolist())
                    found = read_range(reader, raw.spec.name, start, stop)
                    assert found == raw.data[start * width : stop * width], (raw.spec.name, start, stop)

    def test_reads_many_at_once_in_any_order(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            buffers = {raw.spec.name: bytearray(len(raw.data)) for raw in self.sample}
            requests: list[ReadRequest] = []
            for raw in self.sample:
                spec, view = reader.tensors[raw.spec.name], memoryview(buffers[raw.spec.name])
                runs = reader.runs(spec.name, 0, spec.element_count)
                requests += requests_for(runs, spec.dtype.bits // 8, view)
            reader.read_many(requests[::-1])
            assert buffers == {raw.spec.name: raw.data for raw in self.sample}

    def test_reads_from_many_threads(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader, ThreadPoolExecutor(8) as pool:
            wanted = [raw for raw in self.sample for _ in range(20)]
            found = list(pool.map(lambda raw: read_whole(reader, raw.spec.name), wanted))
        assert found == [raw.data for raw in wanted]

    def test_a_file_cut_short_is_refused(self, checkpoint: Path) -> None:
        largest = max(self.data_files(checkpoint), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 1)
        with pytest.raises((IncompleteError, FormatError), match=largest.name):
            self._read_everything(checkpoint)

    def test_a_file_that_shrinks_while_open_is_an_error(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            for path in self.data_files(checkpoint):
                os.truncate(path, path.stat().st_size // 2)
            with pytest.raises((IncompleteError, FormatError)):
                for name in reader.tensors:
                    read_whole(reader, name)

    def test_a_missing_file_is_refused(self, checkpoint: Path) -> None:
        self.data_files(checkpoint)[0].unlink()
        with pytest.raises((IncompleteError, FormatError)):
            self._read_everything(checkpoint)

    def test_identities_tell_a_change(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            before = reader.identities()
            assert {Path(identity.name).name for identity in before} >= {
                path.name for path in self.data_files(checkpoint)
            }
            os.utime(self.data_files(checkpoint)[0], ns=(1, 1))
            assert reader.identities() != before

    def test_closing_releases_every_file(self, checkpoint: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        reader = self.open(checkpoint)
        for name in reader.tensors:
            read_whole(reader, name)
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before

    def _read_everything(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            for name in reader.tensors:
                read_whole(reader, name)


class WriterContract:
    """What a planned layout must give when it is written."""

    sample: Sequence[Raw] = SAMPLE

    def writer(self, folder: Path) -> FolderWriter:
        """The writer, for an empty folder."""
        return FolderWriter(folder)

    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        """Where the tensors go."""
        raise AssertionError("a subclass plans")

    def read_back(self, folder: Path) -> dict[str, bytes]:
        """Every tensor's bytes, read by the framework's own code."""
        raise AssertionError("a subclass reads")

    def test_what_is_written_in_pieces_reads_back(self, tmp_path: Path) -> None:
        layout = self.layout({raw.spec.name: raw.spec for raw in self.sample})
        pieces = self._pieces(layout)
        np.random.default_rng(0).shuffle(pieces)
        self._write(tmp_path, layout, pieces)
        assert self.read_back(tmp_path) == {raw.spec.name: raw.data for raw in self.sample}

    def test_two_parts_write_at_the_same_time(self, tmp_path: Path) -> None:
        layout = self.layout({raw.spec.name: raw.spec for raw in self.sample})
        pieces = self._pieces(layout)
        writer = self.writer(tmp_path)
        writer.create(layout)

        def work(mine: list[tuple[str, int, bytes]]) -> None:
            part = writer.open_part()
            for file, offset, data in mine:
                part.write(file, offset, memoryview(data))
            part.close()

        threads = [threading.Thread(target=work, args=(pieces[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
        assert self.read_back(tmp_path) == {raw.spec.name: raw.data for raw in self.sample}

    def test_create_reserves_the_whole_size(self, tmp_path: Path) -> None:
        layout = self.layout({raw.spec.name: raw.spec for raw in self.sample})
        self.writer(tmp_path).create(layout)
        for file in layout.files:
            assert (tmp_path / file.name).stat().st_size == file.size_bytes

    def test_what_an_interrupted_attempt_wrote_is_kept(self, tmp_path: Path) -> None:
        layout = self.layout({raw.spec.name: raw.spec for raw in self.sample})
        pieces = self._pieces(layout)
        for half in (pieces[::2], pieces[1::2]):
            self._write(tmp_path, layout, half)
        assert self.read_back(tmp_path) == {raw.spec.name: raw.data for raw in self.sample}

    def test_small_files_are_written_as_they_are(self, tmp_path: Path) -> None:
        self.writer(tmp_path).write_bytes("config.json", b"{}")
        assert (tmp_path / "config.json").read_bytes() == b"{}"

    def _pieces(self, layout: Layout, piece_bytes: int = 100) -> list[tuple[str, int, bytes]]:
        data = {raw.spec.name: raw.data for raw in self.sample}
        pieces = [
            (file.name, offset, constant) for file in layout.files for offset, constant in file.constants
        ]
        for file in layout.files:
            for fragment in file.fragments:
                part = _held(data[fragment.tensor], layout.tensors[fragment.tensor], fragment)
                for start in range(0, len(part), piece_bytes):
                    pieces.append(
                        (file.name, fragment.offset_bytes + start, part[start : start + piece_bytes])
                    )
        return pieces

    def _write(self, folder: Path, layout: Layout, pieces: Sequence[tuple[str, int, bytes]]) -> None:
        writer = self.writer(folder)
        writer.create(layout)
        part = writer.open_part()
        for file, offset, data in pieces:
            part.write(file, offset, memoryview(data))
        part.sync()
        part.close()
        writer.finish()


def _held(whole: bytes, spec: TensorSpec, fragment: Fragment) -> bytes:
    """What a fragment holds of a tensor."""
    width = spec.dtype.bits // 8
    if fragment.box is None:
        start = (fragment.flat_start or 0) * width
        return whole[start : start + fragment.length_bytes]
    starts, sizes = fragment.box
    inside = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
    return np.frombuffer(whole, np.uint8).reshape(*spec.shape, width)[inside].tobytes()
