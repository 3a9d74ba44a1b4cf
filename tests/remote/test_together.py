"""One output in a store by several processes: each sends files of its own, the record comes last, and any
number of processes goes on. Ranks are threads here, but for torchrun and a real S3 server at the end.
"""

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from pma import engine, formats, trajectory
from pma.engine import Crew, MergeOptions
from pma.engine.compute import BlockWorker
from pma.engine.journal import Followed, StoreJournal
from pma.engine.lease import LEASE_FILE, this_process
from pma.engine.provenance import heading
from pma.engine.together import hands, in_store
from pma.engine.together.places import look_anew
from pma.errors import Interrupted, MismatchError, NonfiniteError, StorageError, UsageError
from pma.formats.contracts import UNFINISHED_FILE
from pma.remote import Store, location
from pma.testing import tiny_run
from pma.testing.reference import read_all

SHAPES = {"a": (7_000,), "b": (61, 53), "c": (5_003,), "d": (30_000,), "e": (), "f": (9_999,)}
URL = "memory://out"
Outcome = engine.Merge | BaseException


@pytest.fixture
def run(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr("pma.remote.retrying._FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr("pma.engine.journal._BEAT_SECONDS", 0.1)
    monkeypatch.setattr(in_store, "_WATCH_SECONDS", 2.0)
    return tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=3)


def together(
    paths: list[Path],
    size: int,
    *,
    ranks: list[int] | None = None,
    paths_of: dict[int, list[Path]] | None = None,
    **how: Any,
) -> list[Outcome]:
    """What each rank's write returned or raised; only `ranks` of `size` are started."""

    def one(rank: int) -> Outcome:
        points = trajectory.from_checkpoints((paths_of or {}).get(rank, paths)).points
        waits = {"join_seconds": how.get("join_seconds", 60), "silent_seconds": 60}
        crew = Crew(rank=rank, size=size, node=f"node{rank}", **waits)
        options = {"save_seconds": 0.05, "staging": staging(paths), **how}
        options.pop("join_seconds", None)
        with engine.plan(points, MergeOptions(threads=1)) as planned:
            try:
                return engine.write(planned, location(URL), crew=crew, **options)
            except BaseException as error:
                return error

    started = ranks or list(range(size))
    with ThreadPoolExecutor(len(started)) as pool:
        return list(pool.map(one, started))


def staging(paths: list[Path]) -> Path:
    return paths[0].parents[1] / "staging"


def alone(paths: list[Path], out: Path, **how: Any) -> engine.Merge:
    with engine.plan(trajectory.from_checkpoints(paths).points) as planned:
        return engine.write(planned, out, **{"staging": staging(paths), **how})


def there(memory: Any) -> dict[str, bytes]:
    """Names and contents of what lies in the output's place."""
    memory.invalidate_cache()
    return {found.removeprefix("/out/"): memory.cat_file(found) for found in memory.find("/out")}


def weights(memory: Any) -> set[str]:
    return {name for name in there(memory) if name.endswith(".safetensors")}


def is_finished(run: list[Path], memory: Any) -> bool:
    """Nothing is left behind, and every block is what the sources give."""
    left = [name for name in there(memory) if name.startswith(".")]
    staged = list(staging(run).iterdir()) if staging(run).exists() else []
    return not left and not staged and engine.verify(location(URL), samples=None).findings == ()


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    """Calls back with the place of each weight file before it is sent."""
    send = Store.send

    def install(before: Callable[[str], None]) -> None:
        def watched(self: Store, file: Path, place: str) -> Any:
            before(place)
            return send(self, file, place)

        monkeypatch.setattr(Store, "send", watched)

    return install


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weight files that were read from the store."""
    read, found = Store.read, []

    def watched(self: Store, place: str, *where: Any) -> bytes:
        if place.endswith(".safetensors"):
            found.append(Path(place).name)
        return read(self, place, *where)

    monkeypatch.setattr(Store, "read", watched)
    return found


def check_sha256(memory: Any) -> list[str]:
    """Names of the files whose SHA-256 is in the record; all are right."""
    files = there(memory)
    told = {output["name"]: output["sha256"] for output in json.loads(files["pma.json"])["outputs"]}
    assert told == {name: hashlib.sha256(files[name]).hexdigest() for name in told}
    return list(told)


def fail(place: str) -> None:
    if "00002-of" in place:
        deadline = time.monotonic() + 20
        while not any("-00001-of" in sent for sent in _journaled()) and time.monotonic() < deadline:
            time.sleep(0.02)
        raise StorageError(f"{place}: sending failed")


def _journaled() -> list[str]:
    """Files that some rank's journal tells of."""
    from fsspec.implementations.memory import MemoryFileSystem

    words = [file.getvalue() for name, file in list(MemoryFileSystem.store.items()) if ".pma-part-" in name]
    return [line for text in words for line in text.decode().splitlines() if '"sent"' in line]


def test_what_several_send_is_what_one_writes(run: list[Path], memory: Any, tmp_path: Path) -> None:
    done = together(run, 3)
    assert all(isinstance(one, engine.Merge) for one in done), done
    alone(run, tmp_path / "one")
    here = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert there(memory).keys() == here.keys()
    assert {n: d for n, d in there(memory).items() if n != "pma.json"} == {
        n: d for n, d in here.items() if n != "pma.json"
    }
    record, single = (json.loads(found["pma.json"]) for found in (there(memory), here))
    assert {**record, "made_at": 0} == {**single, "made_at": 0}
    assert is_finished(run, memory)
    with engine.plan(trajectory.from_checkpoints(run).points) as planned:
        assert sum(one.bytes_written for one in done[1:]) < planned.bytes_to_write
        assert done[0].bytes_read == planned.bytes_to_read
    again = together(run, 2)
    assert all(one.bytes_resumed == done[0].bytes_written for one in again), again


def test_fewer_files_than_processes_are_resharded(run: list[Path], memory: Any, tmp_path: Path) -> None:
    said: list[str] = []
    done = together(run, 5, tell=said.append)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert [line for line in said if "re-sharded into 5" in line], said
    with engine.plan(trajectory.from_checkpoints(run).points) as planned:
        assert engine.is_written(planned, location(URL))
    with engine.plan(trajectory.from_checkpoints(run[1:]).points) as planned:
        assert not engine.is_written(planned, location(URL))
    alone(run, tmp_path / "one")
    assert read_all(location(URL)) == read_all(tmp_path / "one")
    assert is_finished(run, memory)


def test_goes_on_with_any_number_of_processes(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None]
) -> None:
    sending(fail)
    failed = together(run, 3)
    assert isinstance(failed[0], StorageError)
    assert "is sent: the same command goes on" in str(failed[0])
    assert {type(one) for one in failed} <= {StorageError, Interrupted}
    assert "pma.json" not in there(memory)
    assert formats.read_meta(location(URL)).incomplete is not None
    sent: list[str] = []
    sending(sent.append)
    done = together(run, 2)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert done[0].bytes_resumed > 0
    assert not any("00001-of" in place for place in sent)
    assert is_finished(run, memory)


def test_one_process_goes_on_with_what_several_began(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None]
) -> None:
    sending(fail)
    together(run, 5)  # re-sharded
    sent: list[str] = []
    sending(sent.append)
    alone(run, location(URL))
    assert not any("model-00001-of-00005" in place for place in sent), "it was sent twice"
    assert len(weights(memory)) == 5
    assert is_finished(run, memory)


@pytest.mark.parametrize("size", [1, 3])
def test_fresh_leaves_no_file_of_another_cut(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None], size: int
) -> None:
    sending(fail)
    together(run, 5)  # re-sharded
    memory.pipe_file("/out/below/it", b"of another format")
    sending(lambda place: None)
    if size == 1:
        alone(run, location(URL), fresh=True)
    else:
        together(run, size, fresh=True)
    assert weights(memory) == {f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)}
    assert "below/it" not in there(memory)
    assert is_finished(run, memory)
    assert read_all(location(URL)).keys() == SHAPES.keys()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_stale_view_leaves_what_was_sent_before(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None], fresh: bool
) -> None:
    sending(fail)
    together(run, 5)  # re-sharded
    sending(lambda place: None)
    before = there(memory)
    done = together(run, 2, paths_of={1: run[:2]}, fresh=fresh)
    assert isinstance(done[0], MismatchError), done
    assert "% of" not in str(done[0])
    after = there(memory)
    assert {name: data for name, data in after.items() if name in before and name != UNFINISHED_FILE} == {
        name: data for name, data in before.items() if name != UNFINISHED_FILE
    }
    assert {**json.loads(after[UNFINISHED_FILE]), "released": 0} == {
        **json.loads(before[UNFINISHED_FILE]),
        "released": 0,
    }
    done = together(run, 2)
    assert done[0].bytes_resumed > 0
    assert is_finished(run, memory)


def test_another_merge_is_refused_and_fresh_forgets_it(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None]
) -> None:
    sending(fail)
    together(run, 3)
    sending(lambda place: None)
    before = there(memory)
    other = together(run[1:], 2, join_seconds=2)
    assert "its sources or options were not the same" in str(other[0])
    assert there(memory) == before
    done = together(run[1:], 2, fresh=True)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert done[0].bytes_resumed == 0
    assert is_finished(run, memory)


def test_more_processes_than_there_is_to_cut(run: list[Path], memory: Any) -> None:
    """Six tensors are in six files at most."""
    said: list[str] = []
    done = together(run, 8, tell=said.append)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert "3 output files are fewer than 8 processes" in said[0]
    idle = [one for one in done[1:] if one.bytes_written == 0]
    assert len([line for line in said if "nothing to do; 8 processes" in line]) == len(idle) >= 2
    assert is_finished(run, memory)


def amid(sending: Callable[[Callable[[str], None]], None], *launches: Callable[[], Outcome]) -> list[Outcome]:
    """What the launches end with that are made, once, as the first file is sent."""
    begun, ended = Event(), list[Outcome]()

    def before(place: str) -> None:
        if "00001-of" in place and not begun.is_set():
            begun.set()
            ended.extend(launch() for launch in launches)

    sending(before)
    return ended


@pytest.mark.parametrize("size", [1, 2])
def test_a_second_launch_is_refused_while_the_first_goes_on(
    run: list[Path],
    memory: Any,
    sending: Callable[[Callable[[str], None]], None],
    tmp_path: Path,
    size: int,
) -> None:
    def one_process() -> Outcome:
        try:
            return alone(run, location(URL), staging=tmp_path / "other")
        except UsageError as error:
            return error

    ended = amid(sending, lambda: together(run, 2, ranks=[0])[0], one_process)
    first = [alone(run, location(URL), save_seconds=0.05)] if size == 1 else together(run, size)
    assert all(isinstance(one, engine.Merge) for one in first), first
    assert ["is being written by process" in str(one) for one in ended] == [True, True], ended
    assert is_finished(run, memory)


def test_what_is_underway_when_all_is_removed_does_not_stay(
    run: list[Path], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One meets a bad value while another sends a file."""
    path = run[0] / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    underway, make = Event(), BlockWorker.make

    def slow(self: Any, lpath: str, rpath: str, **how: Any) -> None:
        data = Path(lpath).read_bytes()
        underway.set()
        time.sleep(1)
        self.pipe_file(rpath, data)

    def late(self: Any, block: Any, *more: Any) -> Any:
        if "00003-of" in block.file:
            assert underway.wait(20)
        return make(self, block, *more)

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "put_file", slow)
        patched.setattr(BlockWorker, "make", late)
        done = together(run, 3)
        assert isinstance(done[0], NonfiniteError), done
        for thread in threading.enumerate():
            if thread.name.startswith("pma-send"):
                thread.join()
    assert underway.is_set()
    assert there(memory) == {}


def test_what_is_there_already_is_refused_by_each(run: list[Path], memory: Any) -> None:
    memory.pipe_file("/out/theirs.txt", b"precious")
    done = together(run, 2, join_seconds=2)
    assert [type(one) for one in done] == [UsageError] * 2
    assert str(done[1]).startswith(f"rank 1 on node1: {URL} exists already and is not touched")
    assert there(memory) == {"theirs.txt": b"precious"}


def test_another_view_of_what_was_begun_is_told_to_all(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None]
) -> None:
    sending(fail)
    together(run, 3)
    sending(lambda place: None)
    done = together(run, 2, paths_of={1: run[:2]}, join_seconds=2)
    assert all(isinstance(one, MismatchError) for one in done), done


@pytest.mark.parametrize("size", [1, 2])
def test_who_was_killed_before_it_took_its_lease_leaves_nothing(
    run: list[Path], memory: Any, size: int
) -> None:
    left = hands.local_folder(location(URL), "ab12-1", staging(run))
    left.mkdir(parents=True)
    (left / f"{LEASE_FILE}.ab12").touch()
    if size == 1:
        alone(run, location(URL))
    else:
        together(run, size)
    assert is_finished(run, memory)


def test_another_view_or_a_bad_value_leaves_nothing(run: list[Path], memory: Any) -> None:
    done = together(run, 2, paths_of={1: run[:2]})
    assert all(isinstance(one, MismatchError) for one in done), done
    assert f"rank 1 on node1 does not use {run[2]}" in str(done[0])
    assert there(memory) == {}
    path = run[0] / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    done = together(run, 2)
    assert isinstance(done[0], NonfiniteError), done
    assert there(memory) == {}


@pytest.mark.parametrize("size", [1, 2])
def test_who_was_killed_after_the_record_left_a_finished_merge(
    run: list[Path], memory: Any, size: int
) -> None:
    together(run, 3)
    with engine.plan(trajectory.from_checkpoints(run).points) as planned:
        holder = {"token": "ab" * 16, **ended_process(), "files": 3, "plan": heading(planned)}
    memory.pipe_file(f"/out/{UNFINISHED_FILE}", json.dumps(holder).encode())
    memory.pipe_file(f"/out/.pma-driver-{'ab' * 8}", b"")
    before = there(memory)
    for other in (together(run[1:], 2, ranks=[0]), together(run[1:], 2, ranks=[0], fresh=True)):
        assert "exists already and is not touched" in str(other[0])
    assert there(memory) == before
    if size == 1:
        alone(run, location(URL))
    else:
        done = together(run, size)
        assert all(one.bytes_resumed and not one.bytes_written for one in done), done
        assert {**there(memory), **before} == before
    assert is_finished(run, memory)


def ended_process() -> dict[str, str | int]:
    """What a process of this machine that has ended said of itself."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    return {**this_process(), "pid": ended.pid}


def test_each_takes_the_sha256_of_what_it_sends(run: list[Path], memory: Any, reading: list[str]) -> None:
    done = together(run, 3, sha256=True)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert reading == []
    assert len(check_sha256(memory)) == 3
    assert is_finished(run, memory)


def test_files_that_were_sent_without_a_sha256_are_read_again(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None], reading: list[str]
) -> None:
    sending(fail)
    together(run, 3)
    sending(lambda place: None)
    done = together(run, 2, sha256=True)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert done[0].bytes_resumed > 0
    # the third may or may not have arrived before
    assert "model-00001-of-00003.safetensors" in reading
    assert "model-00002-of-00003.safetensors" not in reading
    check_sha256(memory)
    assert is_finished(run, memory)


def test_signs_of_life_are_seen_in_a_store(run: list[Path]) -> None:
    """Before anything is said, and after."""
    out = location(URL)
    journal, followed = StoreJournal(out / ".pma-part-1"), Followed(out / ".pma-part-1")
    for changes in (1, 2, 3, 4, 5):
        if changes == 3:
            journal.start({"who": "node7"})
        else:
            time.sleep(0.11)
            journal.beat()
        look_anew(out)
        assert followed.news() == {}
        assert followed.changes == changes
        assert followed.heading == (None if changes < 3 else {"who": "node7"})


def test_a_sha256_outlives_who_took_it(
    run: list[Path], memory: Any, sending: Callable[[Callable[[str], None]], None], reading: list[str]
) -> None:
    sending(fail)
    together(run, 3, sha256=True)
    sending(lambda place: None)
    done = together(run, 2, sha256=True)
    assert done[0].bytes_resumed > 0
    assert reading == []
    check_sha256(memory)


def test_a_killed_driver_is_taken_over(run: list[Path], memory: Any) -> None:
    """Its marker and words are there and nothing beats; ours are those of another machine."""
    holder = {"token": "ab" * 16, "host": "elsewhere", "pid": 1, "files": 3, "sent_to": URL}
    memory.pipe_file(f"/out/{UNFINISHED_FILE}", json.dumps(holder).encode())
    memory.pipe_file(f"/out/.pma-driver-{'ab' * 8}", b"")
    started = time.monotonic()
    done = together(run, 2)
    assert time.monotonic() - started > in_store._WATCH_SECONDS
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert is_finished(run, memory)
