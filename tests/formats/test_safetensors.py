"""The safetensors reader and writer against the library, every type of the specification, and hostile
files.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pma import formats
from pma.errors import FormatError, IncompleteError, InputError
from pma.formats import safetensors as pma_safetensors
from pma.formats.folder import LocalFolder
from pma.formats.folder_writer import FolderWriter
from pma.formats.safetensors import SafetensorsReader, layout_of
from pma.formats.safetensors_header import LARGEST_HEADER_BYTES, Header, encode_header, read_header
from pma.testing import Raw, ReaderContract, WriterContract, random_raw, tiny_run
from pma.testing.builders import write_safetensors
from pma.testing.contracts import SAMPLE, read_whole
from pma.testing.refusals import assert_refused
from pma.types import DType, Layout, TensorSpec

EVERY_TYPE = [
    random_raw(f"t.{dtype.name}", dtype, (2, 4), seed=i)
    for i, dtype in enumerate(DType)
    if dtype not in (DType.F4, DType.F6_E2M3, DType.F6_E3M2)
]
ODD_SHAPES = [
    random_raw("scalar", DType.F32, (), seed=1),
    random_raw("empty", DType.BF16, (0, 7), seed=2),
    random_raw("one byte", DType.U8, (1,), seed=3),
]


def header_of(path: Path) -> Header:
    return read_header(LocalFolder(path.parent), path.name)


class TestSingleFile(ReaderContract):
    sample = (*SAMPLE, *EVERY_TYPE, *ODD_SHAPES)

    def write(self, folder: Path, tensors: list[Raw]) -> Path:
        write_safetensors(folder, tensors)
        return folder

    def open(self, path: Path) -> SafetensorsReader:
        return pma_safetensors.open_reader(path)


class TestSharded(TestSingleFile):
    def write(self, folder: Path, tensors: list[Raw]) -> Path:
        write_safetensors(folder, tensors, shards=3)
        return folder


class TestLoneFile(TestSingleFile):
    def write(self, folder: Path, tensors: list[Raw]) -> Path:
        write_safetensors(folder, tensors)
        return folder / "model.safetensors"


class TestWriter(WriterContract):
    sample = (*SAMPLE, *ODD_SHAPES)
    shards = 1

    def layout(self, tensors: dict[str, TensorSpec]) -> Layout:
        shards = {
            name: f"model-{i % self.shards + 1:05}-of-{self.shards:05}.safetensors"
            for i, name in enumerate(tensors)
        }
        return layout_of(tensors, shards if self.shards > 1 else dict.fromkeys(tensors, "model.safetensors"))

    def read_back(self, folder: Path) -> dict[str, bytes]:
        found = {}
        for path in folder.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                found[name] = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return found


class TestShardedWriter(TestWriter):
    shards = 3

    def test_the_index_names_every_tensor_and_the_total(self, tmp_path: Path) -> None:
        layout = self.layout({raw.spec.name: raw.spec for raw in self.sample})
        self._write(tmp_path, layout, self._pieces(layout))
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == {raw.spec.name for raw in self.sample}
        assert index["metadata"]["total_size"] == sum(len(raw.data) for raw in self.sample)


def test_transformers_reads_the_format_marker(tmp_path: Path) -> None:
    layout = layout_of({"a": TensorSpec(name="a", dtype=DType.F32, shape=(2,))}, {"a": "model.safetensors"})
    FolderWriter(tmp_path).create(layout)
    (tmp_path / "model.safetensors").write_bytes(layout.files[0].constants[0][1] + bytes(8))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_sub_byte_types_are_understood(tmp_path: Path) -> None:
    specs = [
        TensorSpec(name="four", dtype=DType.F4, shape=(2, 4)),
        TensorSpec(name="six", dtype=DType.F6_E2M3, shape=(4,)),
        TensorSpec(name="other six", dtype=DType.F6_E3M2, shape=(8,)),
    ]
    data = bytes(range(sum(spec.length_bytes for spec in specs)))
    (tmp_path / "model.safetensors").write_bytes(encode_header(specs, {}) + data)
    with safe_open(tmp_path / "model.safetensors", "np") as file:  # the library agrees that this is valid
        assert set(file.keys()) == {"four", "six", "other six"}
    with closing(formats.open_checkpoint(tmp_path)) as reader:
        assert [spec.length_bytes for spec in reader.tensors.values()] == [4, 3, 6]


def test_wide_elements_come_first_so_that_all_are_aligned() -> None:
    specs = {
        f"t{i}": TensorSpec(name=f"t{i}", dtype=d, shape=(3,))
        for i, d in enumerate((DType.U8, DType.F64, DType.BF16))
    }
    file = layout_of(specs, dict.fromkeys(specs, "model.safetensors")).files[0]
    for fragment in file.fragments:
        assert fragment.offset_bytes % (specs[fragment.tensor].dtype.bits // 8) == 0


tensor_specs = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.sampled_from([d for d in DType if d.bits % 8 == 0]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


@given(tensor_specs)
def test_headers_go_out_and_back(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple]) -> None:
    specs = [TensorSpec(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in drawn]
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(encode_header(specs, {"format": "pt"}) + bytes(sum(spec.length_bytes for spec in specs)))
    header = header_of(path)
    assert dict(header.tensors) == {spec.name: spec for spec in specs}
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {spec.name for spec in specs}


# ---- hostile files: one test a trick ----


def file_with(tmp_path: Path, header: object, data: bytes = bytes(8), *, raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int = 0, stop: int = 8, dtype: object = "F32", shape: object = (2,)) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, stop],
    }


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(), "b": entry(4, 12)}, "overlaps"),
        ({"a": entry(), "b": entry(0, 8)}, "overlaps"),
        ({"a": entry(8, 16)}, "hole"),
        ({"a": entry(dtype="F128")}, "dtype"),
        ({"a": entry(dtype=["F32"])}, "dtype"),
        ({"a": entry(shape=(3,))}, "takes 12 bytes"),
        ({"a": entry(shape=(-2,))}, "shape"),
        ({"a": entry(shape=(2.0,))}, "shape"),
        ({"a": entry(shape=(True, 2))}, "shape"),
        ({"a": entry(shape="2")}, "shape"),
        ({"a": entry(shape=(2**62, 2**62, 0), stop=0)}, "no tensor owns"),
        ({"a": entry(shape=(2**70,))}, "shape"),
        ({"a": entry(shape=(2**62,) * 20)}, "shape"),
        ({"\ud800x": entry()}, "UTF-8"),
        ({"a": entry(8, 0)}, "data_offsets"),
        ({"a": entry(-8, 0)}, "data_offsets"),
        ({"a": {**entry(), "data_offsets": [0, 8, 16]}}, "data_offsets"),
        ({"a": {**entry(), "extra": 1}}, "exactly"),
        ({"a": [1, 2]}, "exactly"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
        ({"__metadata__": [], "a": entry()}, "__metadata__"),
        ({"a": entry(stop=4, shape=(1,))}, "4 bytes that no tensor owns"),
        ({"a": entry(dtype="F4", shape=(1,), stop=0)}, "takes 0.5 bytes"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        header_of(file_with(tmp_path, header))


def test_data_beyond_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="cut short"):
        header_of(file_with(tmp_path, {"a": entry(0, 2**40, shape=(2**38,))}))


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(8), (2**63).to_bytes(8, "little") + b"{}"])
def test_a_file_too_short_or_too_boastful_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        header_of(tmp_path / "model.safetensors")


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((LARGEST_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(8 + LARGEST_HEADER_BYTES + 1)
    with pytest.raises(FormatError, match="header of"):
        header_of(path)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": ' + b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[1]",
        b" {}",
        b'{"a": \xff}',
        b'{"a": NaN',
        b"\x80\x04\x95pickle",
    ],
    ids=["deep list", "deep object", "list", "leading space", "not UTF-8", "cut", "pickle"],
)
def test_a_header_that_is_not_a_json_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(FormatError):
        header_of(file_with(tmp_path, None, raw=raw))


SPACE = LARGEST_HEADER_BYTES - 100
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "as many names as a header has room for": (lambda: _names(230_000), "more names and values"),
    "as many names as are read, and a lie": (
        lambda: _names(50_000) + b',"a":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}',
        "F99",
    ),
    "names of nothing": (
        lambda: b"{" + b",".join(b'"%x":1' % i for i in range(SPACE // 11)) + b"}",
        "more names and values",
    ),
    "empty lists": (lambda: b'{"a":[' + b"[]," * (SPACE // 3) + b"[]]}", "more names and values"),
    "empty objects": (lambda: b'{"a":[' + b"{}," * (SPACE // 3) + b"{}]}", "more names and values"),
    "numbers": (lambda: b'{"a":[' + b"1," * (SPACE // 2) + b"1]}", "more names and values"),
    "one number": (lambda: b'{"a":' + b"9" * SPACE + b"}", "JSON"),
    "text": (lambda: b'{"a":"' + b"x" * SPACE + b'"}', "exactly dtype"),
    "text of wide characters": (lambda: b'{"a":"' + b"x" * SPACE + "😀".encode() + b'"}', "more names"),
    "spaces": (lambda: b"{" + b" " * SPACE + b'"a":1}', "exactly dtype"),
    "deep nesting": (lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON"),
}


def _names(count: int) -> bytes:
    entry = b'"layers.%d.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(count))


@pytest.mark.parametrize("trick", BOMBS)
def test_bombs_are_refused_soon_and_in_little_memory(tmp_path: Path, trick: str) -> None:
    made, reason = BOMBS[trick]
    assert_refused(file_with(tmp_path, None, b"", raw=made()), "model.safetensors", reason)


def test_a_file_of_many_tensors_is_read(tmp_path: Path) -> None:
    path = file_with(tmp_path, None, b"", raw=_names(50_000) + b"}")
    assert len(header_of(path).tensors) == 50_000


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 8))
    with pytest.raises(FormatError, match="twice"):
        header_of(file_with(tmp_path, None, raw=f'{{"a": {one}, "a": {one}}}'.encode()))


def test_terminal_escapes_in_names_are_not_printed(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        header_of(file_with(tmp_path, {"\x1b[2Jweight\n": entry(shape=(3,))}))
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        "a\\b.safetensors",
        "model.bin",
        "",
        "a\x1b[31m.safetensors",
        "\ud800.safetensors",
    ],
)
def test_an_index_may_not_lead_out_of_the_folder(tmp_path: Path, shard: str) -> None:
    folder = tiny_run(tmp_path, steps=1, shards=2)[0]
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["scale"] = shard
    index.write_text(json.dumps(value))
    with pytest.raises(FormatError, match="plain name"):
        formats.open_checkpoint(folder)


def test_index_and_shards_agree_both_ways(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, steps=1, shards=2)[0]
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shard = next(iter(whole["weight_map"].values()))
    for change in ({"ghost": shard}, {"scale": "model-00001-of-00002.safetensors"}):
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | change}))
        if whole["weight_map"] | change != whole["weight_map"]:
            with pytest.raises(FormatError, match=r"index\.json says"):
                formats.open_checkpoint(folder)
    less = {name: file for name, file in whole["weight_map"].items() if name != "scale"}
    index.write_text(json.dumps({"weight_map": less}))
    with pytest.raises(FormatError, match="scale"):
        formats.open_checkpoint(folder)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, steps=1, shards=3)[0]
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    less = {name: file for name, file in whole.items() if not file.startswith("model-00003")}
    index.write_text(json.dumps({"weight_map": less}))
    with pytest.raises(FormatError, match=r"model-00003-of-00003\.safetensors looks"):
        formats.open_checkpoint(folder)


def test_other_tensors_beside_the_model_are_told(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, steps=1)[0]
    write_safetensors(tmp_path / "other", [random_raw("a", DType.BF16, (2,))])
    (folder / "adapter.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with closing(formats.open_checkpoint(folder)) as reader:
        assert "a" not in reader.tensors
        assert reader.ignored_files == ("adapter.safetensors",)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, steps=1, shards=2)[0]
    second = folder / "model-00002-of-00002.safetensors"
    write_safetensors(
        tmp_path / "other",
        [random_raw("embed.weight", DType.BF16, (2,)), random_raw("scale", DType.BF16, ())],
    )
    second.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(FormatError, match="in both"):
        formats.open_checkpoint(folder)


def test_a_single_file_and_an_index_together_are_ambiguous(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, steps=1, shards=2)[0]
    (folder / "model.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(FormatError, match="both"):
        formats.open_checkpoint(folder)


def test_shards_without_an_index_are_incomplete(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, steps=1, shards=2)[0]
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(IncompleteError, match="written last"):
        formats.open_checkpoint(folder)


def test_a_pipe_or_folder_in_place_of_a_shard_does_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="regular file"):
        header_of(tmp_path / "model.safetensors")


def test_symbolic_links_are_followed_as_the_hub_cache_needs(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "blobs", steps=1)[0]
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(folder / "model.safetensors")
    with closing(formats.open_checkpoint(tmp_path / "snapshot")) as reader:
        assert len(read_whole(reader, "embed.weight")) == 32 * 16 * 2


@given(st.binary(max_size=300))
def test_no_bytes_whatever_crash_the_parser(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "model.safetensors"
    for content in (
        noise,
        len(noise).to_bytes(8, "little") + noise,
        len(noise).to_bytes(8, "little") + b"{" + noise,
    ):
        path.write_bytes(content)
        try:
            header = header_of(path)
        except InputError:
            continue
        assert header.file_bytes == len(content)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [random_raw("big", DType.F32, (1024, 1024))])
    before = bytes_read()
    formats.open_checkpoint(tmp_path).close()
    assert bytes_read() - before < 64 * 1024


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_few_files_stay_open(tmp_path: Path) -> None:
    import os

    write_safetensors(tmp_path, [random_raw(f"t{i}", DType.F32, (4,), seed=i) for i in range(60)], shards=60)
    before = len(os.listdir("/proc/self/fd"))
    with closing(formats.open_checkpoint(tmp_path)) as reader:
        for name in reader.tensors:
            read_whole(reader, name)
        assert len(os.listdir("/proc/self/fd")) - before <= 10


def test_numpy_reads_what_we_wrote(tmp_path: Path) -> None:
    spec = TensorSpec(name="a", dtype=DType.F32, shape=(2, 2))
    writer = FolderWriter(tmp_path)
    layout = layout_of({"a": spec}, {"a": "model.safetensors"})
    writer.create(layout)
    part = writer.open_part()
    values = np.arange(4, dtype=np.float32)
    part.write("model.safetensors", 0, memoryview(layout.files[0].constants[0][1]))
    part.write("model.safetensors", layout.files[0].fragments[0].offset_bytes, memoryview(values.tobytes()))
    part.close()
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), values.reshape(2, 2))
