"""Shards of torch's Hugging Face writer that lie: refused with file and reason, at once, in little memory."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma import formats
from pma.errors import InputError
from pma.formats import dcp_safetensors
from pma.formats.safetensors_header import LARGEST_HEADER_BYTES
from pma.testing.contracts import read_whole
from pma.testing.refusals import assert_refused

CORPUS = sorted((Path(__file__).parent / "corpus" / "dcp_safetensors").iterdir())
FIRST, SECOND = (f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2))
SHARDING = "DCP_SHARDING_INFO"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Rows, columns, too few rows, a whole vector and a scalar, as two ranks saved them."""
    return shutil.copytree(CORPUS[0], tmp_path / "step_2")


def read_everything(path: Path) -> dict[str, bytes]:
    with closing(formats.open_checkpoint(path)) as reader:
        return {name: read_whole(reader, name) for name in reader.tensors}


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Let a shard's header say something else: what it holds, where that belongs."""
    header, data = parts(file)
    starts = json.loads(header["__metadata__"][SHARDING])
    change(header, starts)
    if SHARDING in header["__metadata__"]:
        header["__metadata__"][SHARDING] = json.dumps(starts)
    write(file, json.dumps(header).encode(), data)


def test_the_corpus_is_read() -> None:
    for path in CORPUS:
        found = read_everything(path)
        assert found["embed.weight"] == np.arange(24, dtype=np.float32).tobytes()
        assert set(found) == {"embed.weight", "proj.weight", "few.weight", "norm", "scale"}


def begins(*offsets: object, name: str = "embed.weight") -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], starts: dict[str, Any]) -> None:
        starts[name] = {"saved_offsets": list(offsets)}

    return change


def says(name: str, **fields: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, starts: header[name].update(fields)


def sharding(value: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Something else in place of where pieces belong, by a name that `rewrite` does not look at again."""

    def change(header: dict[str, Any], starts: dict[str, Any]) -> None:
        starts.clear()
        starts.update(json.loads(value))

    return change


LIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a piece over another": (begins(2, 0), "overlap"),
    "a piece over the whole of another": (begins(0, 0), "overlap"),
    "a hole before a piece": (begins(4, 0), "hole"),
    "a hole of exabytes": (begins(2**61, 0), "hole"),
    "a piece beside, not below": (begins(3, 4), "hole"),
    "a start that is negative": (begins(-3, 0), "not said where"),
    "a start beyond any tensor": (begins(2**63, 0), "not believable"),
    "a start that is no integer": (begins(3.0, 0), "not said where"),
    "a start that is a truth value": (begins(True, 0), "not said where"),
    "a start that is text": (begins("3", 0), "not said where"),
    "a start of fewer dimensions": (begins(3), "not said where"),
    "a start of more dimensions": (begins(3, 0, 0), "not said where"),
    "a start for a scalar": (begins(1, name="scale"), "not said where"),
    "no start of a piece": (lambda header, starts: starts.pop("embed.weight"), "not said where"),
    "a start that is a list": (lambda header, starts: starts.update({"norm": [0]}), "not said where"),
    "no starts": (sharding("{}"), "not said where"),
    "nothing of starts": (lambda header, starts: header["__metadata__"].pop(SHARDING), "is missing"),
    "another type than in another shard": (says("embed.weight", dtype="I32"), "another type"),
    "fewer dimensions than in another shard": (
        lambda header, starts: (
            header["embed.weight"].update(shape=[12]),
            starts.update({"embed.weight": {"saved_offsets": [12]}}),
        ),
        "different numbers of dimensions",
    ),
    "bytes beyond the file": (says("proj.weight", shape=[4, 4000], data_offsets=[72, 32072]), "cut short"),
    "bytes over each other": (says("norm", data_offsets=[28, 48]), "overlaps"),
    "bytes that nothing owns": (lambda header, starts: header.pop("proj.weight"), "no tensor owns"),
    "a shape of another size": (says("embed.weight", shape=[3, 5]), "takes 60 bytes"),
    "an empty piece of enormous width": (says("few.weight", shape=[0, 2**60]), "hole"),
    "an empty piece that ends beyond any number": (
        lambda header, starts: (
            header["few.weight"].update(shape=[2**63 - 1, 0]),
            starts.update({"few.weight": {"saved_offsets": [2**62 - 1, 0]}}),
        ),
        "not believable",
    ),
}


@pytest.mark.parametrize("trick", LIES)
def test_a_lie_is_refused(checkpoint: Path, trick: str) -> None:
    change, reason = LIES[trick]
    rewrite(checkpoint / SECOND, change)
    with pytest.raises(InputError, match=reason) as caught:
        read_everything(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_name_with_newlines_and_escapes_is_shown_without_them(checkpoint: Path) -> None:
    def change(header: dict[str, Any], starts: dict[str, Any]) -> None:
        header["\x1b[2J\nembed"] = header.pop("embed.weight")

    rewrite(checkpoint / SECOND, change)
    with pytest.raises(InputError, match=r"\\x1b\[2J\\nembed") as caught:
        read_everything(checkpoint)
    assert str(caught.value).isprintable()


def test_a_name_that_leads_out_of_the_folder_is_only_a_name(checkpoint: Path) -> None:
    name = "../../../etc/passwd"

    def change(header: dict[str, Any], starts: dict[str, Any]) -> None:
        header[name], starts[name] = header.pop("norm"), starts.pop("norm")

    rewrite(checkpoint / SECOND, change)
    assert read_everything(checkpoint)[name] == np.ones(5, np.float32).tobytes()


@pytest.mark.parametrize("place", ["starts", "header"])
def test_a_name_twice_is_refused(checkpoint: Path, place: str) -> None:
    header, data = parts(checkpoint / SECOND)
    if place == "header":
        text = json.dumps(header)[:-1] + ',"norm":' + json.dumps(header["norm"]) + "}"
    else:
        starts = header["__metadata__"][SHARDING]
        header["__metadata__"][SHARDING] = starts[:-1] + ',"norm":{"saved_offsets":[0]}}'
        text = json.dumps(header)
    write(checkpoint / SECOND, text.encode(), data)
    with pytest.raises(InputError, match="occurs twice"):
        read_everything(checkpoint)


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_a_shard_that_is_half_written(checkpoint: Path, kept: int) -> None:
    file = checkpoint / SECOND
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="cut short"):
        read_everything(checkpoint)


def test_a_save_of_which_a_rank_is_missing(checkpoint: Path) -> None:
    (checkpoint / FIRST).unlink()
    with pytest.raises(InputError, match="hole"):
        read_everything(checkpoint)


def test_a_pipe_in_place_of_a_shard_does_not_hang(checkpoint: Path) -> None:
    import os

    (checkpoint / SECOND).unlink()
    os.mkfifo(checkpoint / SECOND)
    with pytest.raises(InputError, match="regular file"):
        read_everything(checkpoint)


def test_symbolic_links_are_followed_as_the_hub_cache_needs(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert read_everything(tmp_path / "snapshot") == read_everything(checkpoint)


SPACE = LARGEST_HEADER_BYTES - 2000


def bombs() -> dict[str, tuple[dict[str, Any], str]]:
    """What is put in place of where pieces belong, and how that is refused."""
    return {
        "deep lists": ({SHARDING: "[" * 100_000}, "JSON"),
        "deep objects": ({SHARDING: '{"a":' * 50_000 + "1" + "}" * 50_000}, "JSON"),
        "empty lists": ({SHARDING: '{"a":[' + "[]," * (SPACE // 3) + "[]]}"}, "more names and values"),
        "numbers": ({SHARDING: '{"a":[' + "1," * (SPACE // 2) + "1]}"}, "more names and values"),
        "one number": ({SHARDING: '{"a":' + "9" * 5_000_000 + "}"}, "JSON"),
        "text": ({SHARDING: '{"a":"' + "x" * 10_000_000 + '"}'}, "more names and values"),
        "no JSON": ({SHARDING: "\x80\x04\x95pickle"}, "JSON"),
        "a list": ({SHARDING: "[]"}, "expected an object"),
        "a million names": (
            {SHARDING: "{" + ",".join(f'"{i:x}":1' for i in range(1_000_000)) + "}"},
            "more names and values",
        ),
        "metadata of many names": ({f"{i:x}": "" for i in range(400_000)}, "more names and values"),
    }


@pytest.mark.parametrize("trick", bombs())
def test_bombs_are_refused_soon_and_in_little_memory(checkpoint: Path, trick: str) -> None:
    metadata, reason = bombs()[trick]
    header, data = parts(checkpoint / SECOND)
    header["__metadata__"] = metadata
    write(checkpoint / SECOND, json.dumps(header, separators=(",", ":")).encode(), data)
    assert_refused(checkpoint, str(checkpoint), SECOND, reason)


def test_a_header_of_gigabytes_is_not_read(checkpoint: Path) -> None:
    with open(checkpoint / SECOND, "wb") as file:
        file.write((2**31).to_bytes(8, "little"))
        file.truncate(2**31 + 8)
    assert_refused(checkpoint, SECOND, "header of")


def test_many_pieces_of_a_tensor_that_overlap(tmp_path: Path) -> None:
    """A piece a shard, as of many ranks, in a staircase: as many cells as pieces squared."""
    for rank in range(600):
        name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        entry = {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]}
        info = {SHARDING: json.dumps({"w": {"saved_offsets": [rank, rank]}})}
        write(tmp_path / name, json.dumps({"__metadata__": info, "w": entry}).encode(), bytes(4))
    assert_refused(tmp_path, "w", "overlap")


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.data())
def test_whatever_is_changed_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Fuzz: headers of real shards with bytes replaced, cut out and repeated, their lengths put right."""
    source = data.draw(st.sampled_from(CORPUS))
    path = tmp_path_factory.mktemp("fuzz") / "step_2"
    shutil.copytree(source, path)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = bytearray(whole[8:end])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(header)))
        stop = min(at + data.draw(st.integers(0, 8)), len(header))
        numbers = st.sampled_from(
            [b"0", b"1", b"3", b"-1", b"9" * 20, b"[]", b"{}", b'"', b",", b"2e3", b"null"]
        )
        header[at:stop] = data.draw(st.one_of(numbers, st.binary(max_size=8), st.just(header[at:stop] * 2)))
    write(file, bytes(header), whole[end:])
    with suppress(InputError), closing(dcp_safetensors.open_reader(path)) as reader:
        for name, spec in reader.tensors.items():
            assert len(read_whole(reader, name)) == spec.length_bytes
