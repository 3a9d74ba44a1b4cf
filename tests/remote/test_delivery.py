"""Outputs in a store in memory: what is refused, what is gone on with, what is left behind."""

import json
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest

from pma import engine, formats, verbs
from pma.engine import MergeOptions
from pma.engine.delivery import built_at
from pma.errors import StorageError, UsageError
from pma.remote import RemotePath, Store, location
from pma.testing import tiny_run
from pma.trajectory import Window
from pma.verbs import Choice


@pytest.fixture
def run(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pma.remote.retrying._FIRST_WAIT_SECONDS", 0.001)
    tiny_run(tmp_path / "run", steps=4, shards=2)
    return tmp_path / "run"


def merge(run: Path, out: str = "memory://merged", *, last: int = 3, **how: Any) -> engine.Merge:
    choice = Choice(paths=(run,), window=Window(last=last))
    return verbs.merge(choice, location(out), MergeOptions(), staging=run.parent / "staging", **how)


def names(memory: Any, folder: str = "/merged") -> set[str]:
    return {found.removeprefix(f"{folder}/") for found in memory.find(folder)}


def fail_to_send(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Sending a file with such a name fails for good."""
    send = Store.send

    def failing(self: Store, file: Path, place: str) -> Any:
        if place.endswith(ending):
            raise StorageError(f"{place}: sending failed")
        return send(self, file, place)

    monkeypatch.setattr(Store, "send", failing)


def test_it_is_what_is_written_here(run: Path, memory: Any, tmp_path: Path) -> None:
    done = merge(run)
    here = tmp_path / "here"
    verbs.merge(Choice(paths=(run,), window=Window(last=3)), here)
    assert names(memory) == {path.name for path in here.iterdir()}
    for name in names(memory) - {"pma.json"}:
        assert memory.cat_file(f"/merged/{name}") == (here / name).read_bytes()
    record = json.loads(memory.cat_file("/merged/pma.json"))
    assert record["outputs"] == json.loads((here / "pma.json").read_text())["outputs"]
    assert done.bytes_sent == sum(memory.info(f"/merged/{name}")["size"] for name in names(memory))
    assert list((tmp_path / "staging").iterdir()) == []
    assert engine.verify(location("memory://merged")).findings == ()


def test_damage_in_a_store_is_found(run: Path, memory: Any) -> None:
    merge(run)
    [shard, *_] = sorted(name for name in names(memory) if name.endswith(".safetensors"))
    data = bytearray(memory.cat_file(f"/merged/{shard}"))
    data[-1] ^= 1
    memory.pipe_file(f"/merged/{shard}", bytes(data))
    [finding, *_] = engine.verify(location("memory://merged")).findings
    assert f"memory://merged/{shard}: block 0" in finding


def test_what_is_half_sent_is_no_checkpoint_and_goes_on(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_to_send(patched, "index.json")
        with pytest.raises(StorageError, match="the same command goes on"):
            merge(run)
    assert "pma.json" not in names(memory)
    assert formats.read_meta(location("memory://merged")).incomplete is not None
    before = {name: memory.info(f"/merged/{name}")["created"] for name in names(memory)}
    done = merge(run)
    last = ("model.safetensors.index.json", "pma.json")
    assert done.bytes_sent == sum(memory.info(f"/merged/{name}")["size"] for name in last)
    assert formats.read_meta(location("memory://merged")).incomplete is None
    for name in names(memory):
        if name.endswith(".safetensors"):
            assert memory.info(f"/merged/{name}")["created"] == before[name], "it was sent twice"


def test_what_is_underway_when_another_file_fails_arrives_first_and_is_not_sent_again(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    send, failing = Store.send, Event()

    def one_fails_first(self: Store, file: Path, place: str) -> Any:
        if place.endswith(first):
            failing.set()
            raise StorageError(f"{place}: sending failed")
        if place.endswith(second):
            assert failing.wait(10)
            sleep(0.2)
        return send(self, file, place)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "send", one_fails_first)
        with pytest.raises(StorageError, match="sending failed"):
            merge(run)
    there = names(memory)
    assert second in there
    assert first not in there
    sleep(0.3)
    assert names(memory) == there
    done = merge(run)
    new = names(memory) - there | {"pma.json"}
    assert done.bytes_sent == sum(memory.info(f"/merged/{name}")["size"] for name in new)


def test_what_changed_in_the_store_is_sent_again(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_to_send(patched, "index.json")
        with pytest.raises(StorageError):
            merge(run)
    [shard, *_] = sorted(name for name in names(memory) if name.endswith(".safetensors"))
    memory.pipe_file(f"/merged/{shard}", bytes(memory.info(f"/merged/{shard}")["size"]))
    merge(run)
    assert engine.verify(location("memory://merged")).findings == ()


def test_another_merge_does_not_go_on_with_it(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_to_send(patched, "index.json")
        with pytest.raises(StorageError):
            merge(run)
    with pytest.raises(UsageError, match="its sources or options were not the same"):
        merge(run, last=2)
    merge(run, last=2, fresh=True)
    record = json.loads(memory.cat_file("/merged/pma.json"))
    assert len(record["sources"]) == 2
    assert engine.verify(location("memory://merged")).findings == ()


def test_where_the_staging_folder_is_lost_it_is_built_again(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    with monkeypatch.context() as patched:
        fail_to_send(patched, "pma.json")
        with pytest.raises(StorageError):
            merge(run)
    shutil.rmtree(run.parent / "staging")
    merge(run)
    assert engine.verify(location("memory://merged")).findings == ()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("there", ["notes.txt", "model.safetensors", "pma.json"])
def test_what_is_there_is_not_touched(run: Path, memory: Any, there: str, fresh: bool) -> None:
    memory.pipe_file(f"/merged/{there}", b"mine")
    with pytest.raises(UsageError, match="exists already"):
        merge(run, fresh=fresh)
    assert names(memory) == {there}
    assert memory.cat_file(f"/merged/{there}") == b"mine"


def test_a_file_where_the_output_should_be(run: Path, memory: Any) -> None:
    memory.pipe_file("/merged", b"a file")
    with pytest.raises(UsageError, match="exists already"):
        merge(run)


def test_an_arrival_of_another_size_is_an_error(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(memory).put_file

    def truncated(self: Any, lpath: str, rpath: str, **more: Any) -> None:
        put(self, lpath, rpath, **more)
        if rpath.endswith("00001-of-00002.safetensors"):
            self.pipe_file(rpath, self.cat_file(rpath)[:-1])

    monkeypatch.setattr(type(memory), "put_file", truncated)
    with pytest.raises(StorageError, match=r"bytes after \d+ bytes were sent"):
        merge(run)
    assert "pma.json" not in names(memory)


def test_the_default_staging_folder_is_ones_own(
    run: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    choice = Choice(paths=(run,), window=Window(last=2))
    staging = built_at(location("memory://merged")).parent
    staging.mkdir()
    staging.chmod(0o777)
    with pytest.raises(UsageError, match="not a folder of yours alone"):
        verbs.merge(choice, location("memory://merged"))
    staging.rmdir()
    verbs.merge(choice, location("memory://merged"))
    assert staging.stat().st_mode & 0o777 == 0o700
    assert list(staging.iterdir()) == []


def test_places_in_staging_differ_where_urls_do(tmp_path: Path) -> None:
    first, second = (location(f"s3://bucket/{name}/merged") for name in ("a", "b"))
    assert isinstance(first, RemotePath)
    assert built_at(first, tmp_path) != built_at(second, tmp_path)
    assert built_at(first, tmp_path) == built_at(location("s3://bucket/a/merged/"), tmp_path)
