"""Archives of `torch.save`: read as torch wrote them, written so that torch reads them, and every trick with
zip members refused.
"""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma.errors import FormatError, IncompleteError
from pma.formats.folder import LocalFolder
from pma.formats.torch_archive import StoredTensor, read_archive
from pma.formats.torch_pickle import CannotEncode, TensorPlace, encode
from pma.formats.torch_writing import archive_layout, single_tensor_archive
from pma.formats.unpickling import OrderedMapping, unpickle
from pma.testing.refusals import assert_refused
from pma.types import DType, TensorSpec


def read(path: Path, **how: Any) -> Any:
    with closing(LocalFolder(path.parent)) as folder:
        return read_archive(folder, path.name, **how).value


def elements(path: Path, stored: StoredTensor) -> bytes:
    length = stored.element_count * stored.dtype.bits // 8
    return path.read_bytes()[stored.offset_bytes : stored.offset_bytes + length]


def test_tensors_of_every_type_are_found_where_they_lie(tmp_path: Path) -> None:
    names = (
        "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64"
    )
    types = [getattr(torch, name) for name in [*names.split(), "float8_e4m3fn", "float8_e5m2"]]
    tensors = {str(t): (torch.arange(12).reshape(3, 4) % 2).to(t) for t in types}
    torch.save(tensors, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == (3, 4)
        assert elements(tmp_path / "a.pt", found[name]) == tensor.view(torch.uint8).numpy().tobytes(), name


def test_views_ties_parameters_and_odd_shapes(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    values = {
        "rows": whole[1:3],
        "columns": whole[:, 1:],
        "turned": whole.t(),
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "tied": whole,
    }
    torch.save(values, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert elements(tmp_path / "a.pt", found["rows"]) == whole[1:3].numpy().tobytes()
    assert {name for name, t in found.items() if not t.contiguous} == {"columns", "turned", "expanded"}
    assert found["rows"].storage_key == found["tied"].storage_key == found["turned"].storage_key
    assert found["parameter"].parameter
    assert not found["parameter"].requires_grad
    assert found["empty"].shape == (0, 3)


def test_state_dict_attributes_optimizers_and_plain_values(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shape": torch.Size([2, 3])}
    value |= {
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "path": tmp_path,
        "np": np.float32(0.5),
    }
    torch.save(value, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert isinstance(found["model"], OrderedMapping)
    assert found["model"].attributes["_metadata"][""] == {"version": 1}
    assert found["optimizer"]["state"][0]["exp_avg"].shape == (2, 3)
    assert found["shape"] == (2, 3)
    assert found["dtype"].dtype is DType.BF16
    assert (found["device"], found["path"], found["np"]) == ("cuda:1", str(tmp_path), 0.5)


def test_an_archive_within_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(5), buffer)
    data = buffer.getvalue()
    (tmp_path / "a.distcp").write_bytes(bytes(1000) + data + bytes(10))
    found = read(tmp_path / "a.distcp", offset_bytes=1000, length_bytes=len(data))
    assert elements(tmp_path / "a.distcp", found) == torch.arange(5).numpy().tobytes()
    for offset, length in ((999, len(data)), (1000, len(data) + 1), (1000, len(data) - 1), (1000, 10**9)):
        with pytest.raises((FormatError, IncompleteError)):
            read(tmp_path / "a.distcp", offset_bytes=offset, length_bytes=length)


def test_whole_modules_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read(tmp_path / "a.pt")
    torch.save(torch.eye(3).to_sparse(), tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"_rebuild_sparse_tensor"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, dtype=torch.complex64).conj(), torch.ones(1, dtype=torch.complex64).conj().imag]
)
def test_values_that_are_not_what_is_stored_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": tensor}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="conjugated or negated"):
        read(tmp_path / "a.pt")
    torch.save({"b": tensor.resolve_conj().resolve_neg().contiguous()}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt")["b"].shape == tensor.shape


def test_old_files_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"python -c '.*weights_only=True.*old\.pt") as caught:
        read(path)
    command = str(caught.value).split("Convert it: ")[1]
    assert os.system(f"{command} 2>/dev/null".replace("python", os.sys.executable, 1)) == 0  # type: ignore[attr-defined]
    assert read(path)["a"].shape == (3,)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "b.pt").write_bytes(data[:length])
        with pytest.raises((FormatError, IncompleteError), match=r"b\.pt"):
            read(tmp_path / "b.pt")


def members(path: Path) -> dict[str, bytes]:
    """What a small checkpoint of torch has in it."""
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def packed(path: Path, inside: dict[str, bytes], **how: Any) -> None:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, data in inside.items():
            archive.writestr(zipfile.ZipInfo(name), data, how.get("compression"))


def compressed(path: Path) -> None:
    packed(path, members(path), compression=zipfile.ZIP_DEFLATED)


def duplicated(path: Path) -> None:
    inside = members(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in inside:
            archive.writestr(name, inside[name])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("model/data/0", inside["model/data/0"])


def patched(find: bytes, offset: int, new: bytes, *, last: bool = False) -> Callable[[Path], None]:
    """An archive with bytes replaced at `offset` from the first or last place of `find`."""

    def make(path: Path) -> None:
        packed(path, members(path))
        data = bytearray(path.read_bytes())
        at = (data.rindex(find) if last else data.index(find)) + offset
        data[at : at + len(new)] = new
        path.write_bytes(data)

    return make


def lying_size(path: Path) -> None:
    """As torch writes it: the member's own header gives no size."""
    torch.save({"a": torch.arange(4.0)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 20
    data[at : at + 8] = b"\xff\xff\xff\x0f" * 2
    path.write_bytes(data)


def with_members(**new: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        inside = members(path)
        for name, data in new.items():
            inside[f"model/{name.replace('__', '/').replace('_pkl', '.pkl')}"] = data
        packed(path, inside)

    return make


def with_name(name: str) -> Callable[[Path], None]:
    return lambda path: packed(path, {**members(path), name: b"x"})


def with_pickle(data: bytes) -> Callable[[Path], None]:
    return with_members(data_pkl=data)


def tensor_pickle(
    count: Any = 4, first: Any = 0, size: Any = (4,), stride: Any = (1,), key: Any = "0"
) -> bytes:
    """The pickle of {"a": a tensor} with any record of it."""

    def value(of: Any) -> bytes:
        return pickle.dumps(of, 2)[2:-1]

    storage = (
        b"(" + value("storage") + b"ctorch\nFloatStorage\n" + value(key) + value("cpu") + value(count) + b"tQ"
    )
    arguments = storage + value(first) + value(size) + value(stride) + b"\x89NtR"
    return b"\x80\x02}" + value("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"s."


def many_members(path: Path) -> None:
    inside = members(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in inside:
            archive.writestr(name, inside[name])
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    entry = data[start : data.index(b"PK\x01\x02", start + 1)]
    directory = entry * 60_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 60_000, 60_000, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + end)


def gigabyte_directory(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(2**30 + 4)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 2**30, 4, 0))


def gigabyte_pickle(path: Path) -> None:
    name = b"model/data.pkl"
    length = 2**30
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, 0, 0, 0, 0, 0, length, length, len(name), 0) + name
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, length, length, len(name), *[0] * 6
    )
    with open(path, "wb") as file:
        file.write(local)
        file.seek(len(local) + length)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(entry + name), len(local) + length, 0)
        file.write(entry + name + end)


TRICKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed members": (compressed, "compressed"),
    "a member twice": (duplicated, "twice"),
    "an encrypted member": (patched(b"PK\x01\x02", 8, b"\x01\x00"), "encrypted"),
    "a member encrypted by its own header": (patched(b"PK\x03\x04", 6, b"\x01\x00"), "encrypted"),
    "a member compressed by its own header": (patched(b"PK\x03\x04", 8, b"\x08\x00"), "compressed"),
    "a size that the member denies": (patched(b"PK\x03\x04", 22, b"\x01\x00\x00\x00"), "the member itself 1"),
    "a size in the directory that lies": (patched(b"PK\x01\x02", 20, b"\xff\xff\xff\x0f" * 2), "itself"),
    "a size that only the directory has": (lying_size, "ends behind"),
    "a size of 64 bits that is missing": (patched(b"PK\x01\x02", 20, b"\xff\xff\xff\xff" * 2), "64 bits"),
    "another name in the member": (patched(b"model/data.pkl", 0, b"mOdel"), "disagree"),
    "an offset that lies": (patched(b"PK\x01\x02", 42, b"\x01\x00\x00\x00"), "does not begin"),
    "an offset out of the file": (patched(b"PK\x01\x02", 42, b"\xf0\xff\xff\x0f"), "a.pt"),
    "two members in one place": (patched(b"PK\x01\x02", 42, bytes(4), last=True), "model"),
    "a directory elsewhere": (patched(b"PK\x05\x06", 16, b"\x01\x00\x00\x00"), "does not end where"),
    "a directory with fewer members": (patched(b"PK\x05\x06", 8, b"\x01\x00\x01\x00"), "goes on"),
    "a directory with more members": (patched(b"PK\x05\x06", 8, b"\xff\x00\xff\x00"), "a.pt"),
    "several disks": (patched(b"PK\x05\x06", 4, b"\x01\x00"), "several parts"),
    "a comment": (patched(b"PK\x05\x06", 20, b"\x01\x00"), "several parts"),
    "sixty thousand times one member": (many_members, "twice"),
    "a directory of a gigabyte": (gigabyte_directory, "not believable"),
    "a pickle of a gigabyte": (gigabyte_pickle, "not believable"),
    "a name that leads up": (with_name("model/../../etc/passwd"), "leads out"),
    "an absolute name": (with_name("/etc/passwd"), "leads out"),
    "a name with backslashes": (with_name("model\\..\\x"), "leads out"),
    "a second folder": (with_name("other/data.pkl"), "not in one folder"),
    "a name with an escape": (with_name("\x1b[31m/x"), "not in one folder"),
    "a program": (with_members(constants_pkl=b""), "TorchScript"),
    "big-endian": (with_members(byteorder=b"big"), "byte order"),
    "a storage that is not there": (with_pickle(tensor_pickle(key="7")), "not in the archive"),
    "a storage outside": (with_pickle(tensor_pickle(key="../data.pkl")), "not in the archive"),
    "a storage smaller than said": (with_pickle(tensor_pickle(count=5)), "16 bytes are stored"),
    "a storage larger than said": (with_pickle(tensor_pickle(count=3)), "16 bytes are stored"),
    "a tensor larger than its storage": (with_pickle(tensor_pickle(size=(5,))), "does not fit"),
    "a tensor behind its storage": (with_pickle(tensor_pickle(first=1)), "does not fit"),
    "a tensor before its storage": (with_pickle(tensor_pickle(first=-1)), "no count"),
    "a negative size": (with_pickle(tensor_pickle(size=(-4,))), "no count"),
    "a negative stride": (with_pickle(tensor_pickle(stride=(-1,), first=3)), "no count"),
    "a stride that leaves": (with_pickle(tensor_pickle(stride=(2,))), "does not fit"),
    "an enormous tensor": (with_pickle(tensor_pickle(size=(2**61,) * 2, stride=(0, 0))), "one after"),
    "a thousand dimensions": (with_pickle(tensor_pickle(size=(1,) * 1000, stride=(1,) * 1000)), "1000 dimen"),
    "a size that is text": (with_pickle(tensor_pickle(size=("4",))), "no count"),
    "a size that is a bool": (with_pickle(tensor_pickle(size=(True,))), "no count"),
    "fewer strides than sizes": (with_pickle(tensor_pickle(stride=())), "strides"),
    "a key that is a number": (with_pickle(tensor_pickle(key=0)), "malformed"),
    "an altered tensor": (with_pickle(tensor_pickle()[:-2] + b"](Nebs."), "altered"),
    "a tensor of a class": (
        with_pickle(b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(NNNNtR."), "class of its own"
    ),
    "a parameter of text": (
        with_pickle(b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR."), "than a tensor"
    ),
    "a size of text": (with_pickle(b"\x80\x02ctorch\nSize\n(X\x01\x00\x00\x00atR."), "than counts"),
    "no mapping": (with_pickle(b"\x80\x02N."), "expected a state dict"),
    "no tensor": (with_pickle(b"\x80\x02}."), "expected tensors by name"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_are_refused_fast_and_in_little_memory(trick: str, tmp_path: Path) -> None:
    make, words = TRICKS[trick]
    path = tmp_path / "model.pt"
    make(path)
    assert_refused(path, words if words != "a.pt" else "model.pt")


def filled(value: Any, seed: int = 0) -> bytes:
    """The file that a planned archive becomes, with bytes of 0 and 1 for data."""
    layout = archive_layout("a.pt", value)
    data = bytearray(os.urandom(layout.size_bytes))  # what nobody writes shows
    for offset, constant in layout.constants:
        data[offset : offset + len(constant)] = constant
    random = np.random.default_rng(seed)
    for fragment in layout.fragments:
        assert fragment.offset_bytes % 64 == 0
        start, stop = fragment.offset_bytes, fragment.offset_bytes + fragment.length_bytes
        data[start:stop] = random.integers(0, 2, fragment.length_bytes, np.uint8).tobytes()
    return bytes(data)


def test_what_is_planned_is_read_by_torch(tmp_path: Path) -> None:
    quantised = [DType.F4, DType.F6_E2M3, DType.F6_E3M2]
    specs = [TensorSpec(name=d.name, dtype=d, shape=(2, 3)) for d in DType if d not in quantised]
    specs += [
        TensorSpec(name="scalar", dtype=DType.F32, shape=()),
        TensorSpec(name="empty", dtype=DType.BF16, shape=(0, 3)),
    ]
    state = OrderedMapping()
    state.update({spec.name: spec for spec in specs})
    state.attributes = {"_metadata": {"": {"version": 1}}}
    shared = [1, {"x": (2, 3)}]
    grown = TensorPlace(
        spec=TensorSpec(name="p", dtype=DType.F32, shape=(2,)), parameter=True, requires_grad=True
    )
    value = {
        "model": state,
        "p": grown,
        "rest": [shared, shared, -1, 2**70, "\u20ac", None, 1.5, b"\x00\xff", True],
    }
    (tmp_path / "a.pt").write_bytes(filled(value))
    for mmap in (False, True):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert found["rest"] == value["rest"]
        assert found["rest"][0] is found["rest"][1]
        assert isinstance(found["p"], torch.nn.Parameter)
        assert found["model"]._metadata == state.attributes["_metadata"]
        assert {name: tuple(t.shape) for name, t in found["model"].items()} == {
            s.name: s.shape for s in specs
        }
    ours = read(tmp_path / "a.pt")
    for name, tensor in found["model"].items():
        data = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert elements(tmp_path / "a.pt", ours["model"][name]) == data
        assert ours["model"][name].dtype.name == name or name in ("scalar", "empty")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.read("archive/byteorder") == b"little"


def test_files_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets of 64 bits, in a file with holes."""
    large = TensorSpec(name="large", dtype=DType.U8, shape=(5 * 2**30,))
    small = TensorSpec(name="small", dtype=DType.F32, shape=(3,))
    layout = archive_layout("a.pt", {"large": large, "small": small})
    path = tmp_path / "a.pt"
    with open(path, "wb") as file:
        for offset, constant in layout.constants:
            file.seek(offset)
            file.write(constant)
        last = layout.fragments[1]
        file.seek(last.offset_bytes)
        file.write(np.arange(3, dtype=np.float32).tobytes())
    assert path.stat().st_size == layout.size_bytes
    found = read(path)
    assert found["small"].offset_bytes == last.offset_bytes > 2**32
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["small"].tolist() == [0, 1, 2]
    assert loaded["large"].shape == large.shape


def test_a_large_file_of_torch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with torch.serialization.skip_data():
        large = torch.empty(2**31 + 5, dtype=torch.bfloat16)
        torch.save({"large": large, "small": torch.ones(3)}, path)
    found = read(path)
    assert found["large"].shape == (2**31 + 5,)
    assert found["small"].offset_bytes > 2**32
    path.unlink()


def test_the_archive_of_one_tensor() -> None:
    for dtype, shape in ((DType.F32, (2, 3)), (DType.BF16, ()), (DType.I64, (0, 3)), (DType.U16, (5,))):
        before, length, behind = single_tensor_archive(dtype, shape)
        loaded = torch.load(io.BytesIO(before + bytes(length) + behind), weights_only=True)
        assert tuple(loaded.shape) == shape
        assert not loaded.any()


def test_records_are_written_as_they_were_or_not_at_all() -> None:
    listed = ["a.Config", "a.make"]
    object_ = b"\x80\x02ca\nConfig\n)\x81}X\x01\x00\x00\x00wK\x03sb."
    call = b"\x80\x02ca\nmake\nK\x01\x85R(K\x02K\x03e(X\x01\x00\x00\x00xNu."
    for data in (object_, call):
        record = unpickle(data, "x", records=listed)
        again = unpickle(encode(record)[0], "x", records=listed)
        for field in ("name", "args", "called", "state", "entries", "elements"):
            assert getattr(record, field) == getattr(again, field), field
    for value in (object(), np.float64(1), StoredTensor, {"a": {1, 2}, "b": object()}):
        with pytest.raises(CannotEncode):
            encode(value)
    endless: list[Any] = []
    endless.append(endless)
    again = unpickle(encode(endless)[0], "x")
    assert again[0] is again
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(CannotEncode, match="deep"):
        encode(deep)
