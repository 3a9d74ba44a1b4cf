"""Checkpoints that lie or attack: refused with file and reason, at once, in little memory, nothing run."""

import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

from pma.errors import InputError, PmaError
from pma.formats import dcp as dcp_format
from pma.formats import dcp_encoding, dcp_metadata
from pma.testing.contracts import read_whole
from pma.types import Role

CORPUS = Path(__file__).parent / "corpus" / "dcp_metadata"
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
SIZE = torch.Size


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "c"
    weights = {"w": torch.arange(24.0).reshape(6, 4), "v": torch.ones(8, dtype=torch.bfloat16), "n": 5}
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "c")


def rewrite(path: Path, change: Callable[[Metadata], object]) -> None:
    """Let torch's own classes say something else."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def read_everything(path: Path) -> None:
    with closing(dcp_format.open_reader(path)) as reader:
        for name in reader.tensors:
            read_whole(reader, name)


def place(metadata: Metadata, name: str) -> _StorageInfo:
    found: _StorageInfo = next(v for k, v in metadata.storage_data.items() if k.fqn == name)
    return found


def set_place(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(place(metadata, "w"), name, value)

    return change


def set_chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].chunks = [
            ChunkStorageMetadata(SIZE(starts), SIZE(sizes)) for starts, sizes in boxes
        ]
        item = place(metadata, "w")
        for starts, _ in boxes:
            metadata.storage_data[MetadataIndex("w", starts)] = item

    return change


def rename(metadata: Metadata) -> None:
    metadata.state_dict_metadata["evil\n\x1b[31m"] = metadata.state_dict_metadata.pop("w")


def swap_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].properties.dtype = torch.int32


def forget(metadata: Metadata) -> None:
    del metadata.storage_data[next(k for k in metadata.storage_data if k.fqn == "w")]


LIES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a path that is absolute": (set_place(relative_path="/etc/passwd"), "not a plain name"),
    "a path that goes up": (set_place(relative_path="../c/__0_0.distcp"), "not a plain name"),
    "a path that is up": (set_place(relative_path=".."), "not a plain name"),
    "a path into a folder": (set_place(relative_path="x/__0_0.distcp"), "not a plain name"),
    "a path of Windows": (set_place(relative_path="x\\y"), "not a plain name"),
    "a path with an escape": (set_place(relative_path="\x1b[2J"), "not a plain name"),
    "an offset beyond the file": (set_place(offset=10**9), "places an item|has an item"),
    "an offset beyond any file": (set_place(offset=2**70), "not believable"),
    "an offset before the file": (set_place(offset=-1), "not believable"),
    "an offset that is no number": (set_place(offset="0"), "not believable"),
    "an offset that is a truth value": (set_place(offset=True), "not believable"),
    "a length beyond the file": (set_place(length=10**9), "places an item|has an item"),
    "items over each other": (set_place(offset=0), "overlap|archive|begins|tensor|member"),
    "a transformed item": (set_place(transform_descriptors=["zstd"]), "transformed"),
    "chunks over each other": (set_chunks(((0, 0), (4, 4)), ((2, 0), (4, 4))), "overlap"),
    "a hole between chunks": (set_chunks(((0, 0), (2, 4)), ((4, 0), (2, 4))), "hole"),
    "an overlap as large as the hole": (
        set_chunks(((0, 0), (2, 4)), ((1, 0), (2, 4)), ((4, 0), (2, 4))),
        "overlap",
    ),
    "a chunk beyond the tensor": (set_chunks(((0, 0), (7, 4))), "outside"),
    "a chunk of other dimensions": (set_chunks(((0,), (24,))), "not believable"),
    "a chunk with a negative size": (set_chunks(((0, 0), (-6, 4))), "not believable"),
    "a chunk of another size than stored": (set_chunks(((0, 0), (3, 4)), ((3, 0), (3, 4))), "stored|overlap"),
    "an item that is nowhere": (forget, "not stored"),
    "another type than stored": (swap_dtype, "expected"),
    "a name that is nowhere": (rename, r"evil\\n\\x1b"),
}


@pytest.mark.parametrize("trick", LIES)
def test_a_lie_is_refused(checkpoint: Path, trick: str) -> None:
    change, reason = LIES[trick]
    rewrite(checkpoint, change)
    with pytest.raises(InputError, match=reason) as caught:
        read_everything(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\x1b" not in str(caught.value)


class Nested:
    """Something whose pickle calls `function` with `arguments`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that would touch `canary`, or are bombs."""
    import os
    from operator import methodcaller

    touch = f"open({str(canary)!r}, 'w')"
    system = Nested(os.system, f"touch {canary}")
    metadata = Metadata({}, planner_data=system, storage_data={})
    long_names = b"".join(b"\x8c\x07" + b"%07d" % n + b"\x94N" for n in range(300_000))
    return {
        "os.system": pickle.dumps(system),
        "os.system inside a Metadata": pickle.dumps(metadata),
        "os.system as a key": pickle.dumps(Metadata({"w": BytesStorageMetadata()}, storage_data={system: 1})),
        "eval": pickle.dumps(Nested(eval, touch)),
        "exec": pickle.dumps(Nested(exec, touch)),
        "getattr": pickle.dumps(Nested(getattr, "", "join")),
        "getattr of a class we know": pickle.dumps(Nested(getattr, Metadata, "__init__")),
        "a method of a class we know": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata"
        b"\x8c\x11Metadata.__init__\x93.",
        "methodcaller": pickle.dumps(Nested(methodcaller, "system", f"touch {canary}")),
        "a class outside the list": pickle.dumps(subprocess.Popen.__class__),
        "torch.load": pickle.dumps(Nested(torch.load, str(canary))),
        "protocol 0": b"cos\nsystem\n(S'touch %s'\ntR." % str(canary).encode(),
        "inst": b"(S'touch %s'\nios\nsystem\n." % str(canary).encode(),
        "a persistent id": b"\x80\x04\x8c\x01aQ.",
        "an extension": b"\x80\x04\x82\x01.",
        "deep nesting": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a memo index of two gigabytes": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "a long string that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.",
        "a long integer": b"\x80\x04\x8b" + struct.pack("<i", 2**30) + b"1.",
        "a million names": b"\x80\x04}(" + long_names * 4 + b"u.",
        "nothing": b"",
        "zeros": bytes(1000),
        "a list": pickle.dumps([1, 2, 3]),
        "an integer": pickle.dumps(7),
    }


_MEASURE = """
import json, resource, sys, time
from pathlib import Path
from pma.errors import InputError
from pma.formats import dcp, read_meta
import pma.formats.pickle_scan
for path in sys.argv[2:]:
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    try:
        dcp.open_reader(Path(path))
        print(json.dumps([path, "accepted", 0, 0]))
    except InputError as error:
        seconds = time.process_time() - begin
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
        print(json.dumps([path, str(error), seconds, grown / 1024]))
"""


def test_attacks_are_refused_at_once_in_little_memory_and_nothing_runs(
    original: Path, tmp_path: Path
) -> None:
    canary, paths = tmp_path / "canary", {}
    for name, data in attacks(canary).items():
        paths[name] = shutil.copytree(original, tmp_path / name.replace(" ", "_"))
        (paths[name] / ".metadata").write_bytes(data)
    first = [str(paths["os.system"])]  # what is imported at first use is not the attack's
    command = [sys.executable, "-c", _MEASURE, "-", *first, *map(str, paths.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert len(results) == len(paths)
    for path, message, seconds, grown_mib in results:
        assert message != "accepted", path
        assert ".metadata" in message, message
        assert seconds < 1, (path, seconds)
        assert grown_mib < 64, (path, grown_mib)
    assert not canary.exists()


def test_a_pickle_in_an_entry_is_never_opened(original: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    import os

    weights = {"w": torch.ones(4), "train_state": {"step": Nested(os.system, f"touch {canary}")}}
    dcp.save(weights, checkpoint_id=tmp_path / "c", no_dist=True)
    canary.unlink(missing_ok=True)
    with closing(dcp_format.open_reader(tmp_path / "c")) as reader:
        spec = reader.tensors["train_state.step"]
        assert spec.role is Role.OTHER
        assert b"system" in read_whole(reader, spec.name)
    assert dcp_format.read_meta(tmp_path / "c").step is None
    assert not canary.exists()


@pytest.mark.parametrize("trick", ["cut short", "another item", "compressed", "no archive"])
def test_items_that_are_not_what_they_should_be(checkpoint: Path, trick: str) -> None:
    file = checkpoint / "__0_0.distcp"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    item = place(metadata, "w")
    data = bytearray(file.read_bytes())
    if trick == "cut short":
        del data[-1:]
    elif trick == "no archive":
        data[item.offset : item.offset + 4] = b"abcd"
    elif trick == "another item":
        data[item.offset : item.offset + item.length] = data[: item.length]
    else:
        with zipfile.ZipFile(checkpoint / "z", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02N.")
        packed = (checkpoint / "z").read_bytes()
        (checkpoint / "z").unlink()
        data[item.offset : item.offset + item.length] = packed.ljust(item.length, b"\0")
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"__0_0\.distcp"):
        read_everything(checkpoint)


def test_one_item_among_many_that_differs_is_found(tmp_path: Path) -> None:
    """Items of one kind are not taken on trust: each is looked at."""
    weights = {f"layer.{n}.weight": torch.full((6, 4), float(n)) for n in range(8)}
    dcp.save(weights, checkpoint_id=tmp_path / "c", no_dist=True)
    metadata = pickle.loads((tmp_path / "c/.metadata").read_bytes())
    item = place(metadata, "layer.5.weight")
    file = tmp_path / "c/__0_0.distcp"
    data = bytearray(file.read_bytes())
    name = data.index(b"/data/0", item.offset)
    at = data.rindex(b"PK\x03\x04", 0, name)
    data[at + 28] ^= 1  # the length of an extra field, after which the data would lie elsewhere
    file.write_bytes(data)
    with closing(dcp_format.open_reader(tmp_path / "c")) as reader:
        found = {name: reader.fragments(name)[0].offset_bytes for name in weights}
    begins = {found[name] - place(metadata, name).offset for name in weights if name != "layer.5.weight"}
    assert {found["layer.5.weight"] - item.offset} == {begins.pop() + 1}
    assert not begins


def test_a_legitimate_metadata_of_many_chunks_is_read_in_seconds(tmp_path: Path) -> None:
    ranks, count = 500, 800
    one = np.arange(ranks, dtype=np.int64)
    tensor = dcp_metadata.ChunkedTensor(
        dtype=dcp_metadata.TORCH_DTYPES["bfloat16"],
        shape=(ranks * 8, 64),
        starts_CD=np.stack([one * 8, one * 0], 1),
        sizes_CD=np.stack([one * 0 + 8, one * 0 + 64], 1),
        file_C=one,
        offset_C=one * 0,
        length_C=one * 0 + 2500,
    )
    tensors = {f"layers.{n}.weight": replace(tensor, offset_C=one * 0 + n * 2500) for n in range(count)}
    files = tuple(f"__{rank}_0.distcp" for rank in range(ranks))
    nothing = np.empty((0, 3), np.int64)
    written = dcp_metadata.Metadata(files=files, tensors=tensors, entries={}, paths={}, items=nothing)
    data = dcp_encoding.encode(written)
    begin = time.process_time()
    found = dcp_metadata.parse(data, "here", ranks * count * 2500)
    seconds = time.process_time() - begin
    assert sum(len(t.file_C) for t in found.tensors.values()) == 400_000
    assert seconds < 15, seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 * 2**20


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(CORPUS.iterdir())]


def test_the_corpus_is_read() -> None:
    for data in seeds():
        assert dcp_metadata.parse(data, "corpus", 10**9).files


@settings(max_examples=400)
@given(st.data())
def test_whatever_is_changed_is_read_or_refused(data: st.DataObject) -> None:
    """Fuzz: bytes of real metadata replaced, cut out and repeated; nothing but our own errors comes out."""
    content = bytearray(data.draw(st.sampled_from(seeds())))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        end = min(at + data.draw(st.integers(0, 12)), len(content))
        content[at:end] = data.draw(st.one_of(st.binary(max_size=12), st.just(bytes(content[at:end]) * 2)))
    with suppress(PmaError):
        dcp_metadata.parse(bytes(content), "here", 10**6)
