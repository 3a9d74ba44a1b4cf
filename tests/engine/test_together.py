"""One output by several processes: the same bits for any number of them, and nobody goes on alone when one
fails. Ranks are threads here; real processes are started, and killed, in tests/torture.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import pma.engine.compute  # noqa: F401  # before it could take the chunks' size from a test
from pma import engine, trajectory
from pma.engine import Crew, MergeOptions, blocks, journal, lease, partition, provenance
from pma.engine import building as building_module
from pma.engine.attempt import attempt
from pma.engine.building import Building, kept_up
from pma.engine.journal import JOURNAL_FILE, Followed, Journal, journals_of_others
from pma.engine.lease import LEASE_FILE, Lease, is_gone, this_process
from pma.engine.on_ray import task
from pma.engine.staging import leftover_bytes, make_staging_folder, staging_folder
from pma.engine.stopping import StopFlag
from pma.engine.together import part as part_module
from pma.engine.together.driver import Driver
from pma.engine.together.part import carry_out
from pma.engine.together.writing import commit
from pma.errors import (
    Interrupted,
    MismatchError,
    NonfiniteError,
    PmaError,
    SpaceError,
    StorageError,
    UsageError,
)
from pma.formats.folder_writer import FolderPart
from pma.testing import tiny_run

SHAPES = {"a": (7_000,), "b": (61, 53), "c": (5_003,), "d": (30_000,), "e": (), "f": (9_999,)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, partition, building_module, provenance):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    return tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=2)


def plan(paths: Sequence[Path], **options: object) -> engine.Plan:
    options = {"threads": 1, **options}
    return engine.plan(trajectory.from_checkpoints(list(paths)).points, MergeOptions(**options))


def crew(rank: int, size: int, **how: float) -> Crew:
    return Crew(rank=rank, size=size, node=f"node{rank}", **{"join_seconds": 60, "silent_seconds": 60, **how})


Outcome = engine.Merge | BaseException


def together(
    paths: Sequence[Path], out: Path, size: int, ranks: Sequence[int] | None = None, **how: object
) -> list[Outcome]:
    """What each rank's write returned or raised; only `ranks` of `size` are started."""

    def one(rank: int) -> Outcome:
        with plan(how.get("paths_of", {}).get(rank, paths)) as planned:
            options = {k: v for k, v in how.items() if k not in ("paths_of", "crews")}
            mine = how.get("crews", {}).get(rank, crew(rank, size))
            try:
                return engine.write(planned, out, crew=mine, **options)
            except BaseException as error:
                return error

    started = range(size) if ranks is None else ranks
    with ThreadPoolExecutor(len(started)) as pool:
        return list(pool.map(one, started))


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture
def expected(run: list[Path], tmp_path: Path) -> dict[str, bytes]:
    with plan(run) as planned:
        engine.write(planned, tmp_path / "one")
    return weights(tmp_path / "one")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Calls back before each block that is written, with how many this rank wrote before."""

    write = FolderPart.write

    def install(before: Callable[[int], None]) -> None:
        counts: Counter[FolderPart] = Counter()  # ranks have a hand on the files each, and a thread

        def counted(part: FolderPart, file: str, offset: int, values: memoryview) -> None:
            counts[part] += 1
            before(counts[part] - 1)
            write(part, file, offset, values)

        monkeypatch.setattr(FolderPart, "write", counted)

    return install


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_bits_for_any_number_of_processes(
    run: list[Path], tmp_path: Path, expected: dict[str, bytes], size: int
) -> None:
    moved: list[tuple[int, int]] = []
    done = together(run, tmp_path / "out", size, progress=lambda r, w: moved.append((r, w)))
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert weights(tmp_path / "out") == expected
    assert engine.verify(tmp_path / "out", samples=None).findings == ()
    assert not hidden(tmp_path) + hidden(tmp_path / "out")
    with plan(run) as planned:
        assert done[0].bytes_written == planned.bytes_to_write
        assert done[0].bytes_read == planned.bytes_to_read
        parts = planned.partition(size)
        assert [one.bytes_written for one in done[1:]] == [part.bytes_to_write for part in parts[1:]]
    record = json.loads((tmp_path / "out" / "pma.json").read_text())
    single = json.loads((tmp_path / "one" / "pma.json").read_text())
    assert {**record, "made_at": 0} == {**single, "made_at": 0}


def test_more_processes_than_blocks(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", steps=2, shapes={"a": (3000,)})
    said: list[str] = []
    done = together(run, tmp_path / "out", 5, tell=said.append)
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert engine.verify(tmp_path / "out", samples=None).findings == ()
    idle = [one for one in done[1:] if one.bytes_written == 0]
    assert len(said) == len(idle) > 1
    assert all("nothing to do; 5 processes" in line for line in said)


def test_a_finished_merge_that_is_launched_again_is_left_as_it_is(run: list[Path], tmp_path: Path) -> None:
    """As where a launcher starts all processes anew because one of them failed after the end."""
    together(run, tmp_path / "out", 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = together(run, tmp_path / "out", 3)
    with plan(run) as planned:
        assert [one.bytes_resumed for one in again] == [planned.bytes_to_write] * 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    other = together(run[1:], tmp_path / "out", 2, ranks=[0])
    assert "exists already" in str(other[0])


def copied_with(run: list[Path], folder: Path, change: Callable[[Path], None]) -> list[Path]:
    """The same checkpoints as another node sees them: by links, but for one file."""
    for path in run:
        (folder / path.name).mkdir(parents=True)
        for file in path.iterdir():
            os.link(file, folder / path.name / file.name)
    victim = folder / run[1].name / "model-00001-of-00002.safetensors"
    data = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(data)
    change(victim)
    return [folder / path.name for path in run]


def test_a_stale_view_is_named_before_anything_is_written(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = copied_with(run, tmp_path / "stale" / "run", lambda file: os.utime(file, ns=(0, 77)))
    # as seen at the same place: what a plan says of paths is not what differs here
    monkeypatch.setattr(provenance, "absolute", lambda path: tmp_path / "run" / path.name)
    view = part_module.view

    def as_there(planned: engine.Plan) -> dict[str, object]:
        return json.loads(json.dumps(view(planned)).replace(str(tmp_path / "stale"), str(tmp_path)))

    monkeypatch.setattr(part_module, "view", as_there)
    done = together(run, tmp_path / "out", 3, paths_of={2: stale})
    assert isinstance(done[0], MismatchError)
    found = str(done[0])
    assert "rank 2 on node2 sees" in found
    assert f"{run[1]}/model-00001-of-00002.safetensors with time 77 ns, rank 0 on node0 with time" in found
    assert isinstance(done[2], MismatchError)
    assert isinstance(done[1], Interrupted)
    assert not hidden(tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_sources_or_options_on_one_node(run: list[Path], tmp_path: Path) -> None:
    done = together(run, tmp_path / "out", 2, paths_of={1: run[:2]})
    assert f"rank 1 on node1 does not use {run[2]}, rank 0 on node0 uses it" in str(done[0])
    assert not hidden(tmp_path)


def test_a_stale_view_leaves_what_an_earlier_attempt_did(
    run: list[Path],
    tmp_path: Path,
    expected: dict[str, bytes],
    written: Callable[[Callable[[int], None]], None],
) -> None:
    interrupted_after(3, run, tmp_path / "out", 2, written)
    done = together(run, tmp_path / "out", 2, paths_of={1: run[:2]})
    assert all(isinstance(one, MismatchError) for one in done)
    again = together(run, tmp_path / "out", 2)
    assert again[0].bytes_resumed > 0
    assert weights(tmp_path / "out") == expected


def journaled(out: Path) -> int:
    """Chunks that the journals of all ranks tell of."""
    folder = staging_folder(out)
    return sum(len(Followed(path).news()) for path in (folder / JOURNAL_FILE, *journals_of_others(folder)))


def interrupted_after(
    count: int,
    run: list[Path],
    out: Path,
    size: int,
    written: Callable[[Callable[[int], None]], None],
) -> list[Outcome]:
    """An attempt in which every rank fails after `count` blocks, when all of those are journaled."""

    def before(number: int) -> None:
        if number >= count:
            deadline = time.monotonic() + 60
            while journaled(out) < count * size and time.monotonic() < deadline:
                time.sleep(0.02)
            raise StorageError("the storage failed")

    written(before)
    done = together(run, out, size, save_seconds=0.01)
    written(lambda number: None)
    assert all(isinstance(one, PmaError) for one in done)
    assert staging_folder(out).is_dir()
    return done


@pytest.mark.parametrize("size", [1, 2, 4])
def test_goes_on_from_all_journals_with_any_number_of_processes(
    run: list[Path],
    tmp_path: Path,
    expected: dict[str, bytes],
    written: Callable[[Callable[[int], None]], None],
    size: int,
) -> None:
    failed = interrupted_after(3, run, tmp_path / "out", 3, written)
    assert "the same command goes on" in str(failed[0])
    others = journals_of_others(staging_folder(tmp_path / "out"))
    assert len(others) == 3  # rank 0's words, and a journal of each other
    assert sum(len(Followed(path).news()) > 0 for path in others) == 2
    if size == 1:
        with plan(run) as planned:
            done = [engine.write(planned, tmp_path / "out")]
    else:
        done = together(run, tmp_path / "out", size)
    assert done[0].bytes_resumed > 4 * 4096  # more than any one rank had done
    assert weights(tmp_path / "out") == expected
    assert not hidden(tmp_path) + hidden(tmp_path / "out")


def test_fresh_forgets_all_journals(
    run: list[Path],
    tmp_path: Path,
    expected: dict[str, bytes],
    written: Callable[[Callable[[int], None]], None],
) -> None:
    interrupted_after(3, run, tmp_path / "out", 3, written)
    other = together(run[1:], tmp_path / "out", 2)
    assert all("sources were not the same" in str(one) for one in other), other
    done = together(run, tmp_path / "out", 2, fresh=True)
    assert done[0].bytes_resumed == 0
    assert weights(tmp_path / "out") == expected


def test_a_bad_value_in_one_part_stops_all_and_leaves_nothing(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", steps=2, shapes=SHAPES)
    path = run[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")  # the last element, in the last part
    done = together(run, tmp_path / "out", 3, save_seconds=0.05)
    assert isinstance(done[0], NonfiniteError)
    assert "rank 2 on node2: f[9998]" in str(done[0])
    assert isinstance(done[2], NonfiniteError)
    assert isinstance(done[1], Interrupted)
    assert not hidden(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_rank_that_does_not_come_is_named(run: list[Path], tmp_path: Path) -> None:
    crews = {0: crew(0, 3, join_seconds=0.5)}
    done = together(run, tmp_path / "out", 3, ranks=[0, 1], crews=crews)
    assert "rank 2 did not come" in str(done[0])
    assert isinstance(done[1], Interrupted)
    assert not hidden(tmp_path)
    alone = together(run, tmp_path / "out", 3, ranks=[1], crews={1: crew(1, 3, join_seconds=0.2)})
    assert "rank 1 on node1: rank 0 did not begin" in str(alone[0])
    assert not hidden(tmp_path)


def test_what_rank_0_refuses_at_once_is_not_waited_for(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = {rank: crew(rank, 3, join_seconds=2) for rank in range(3)}
    (tmp_path / "out").mkdir()
    done = together(run, tmp_path / "out", 3, crews=soon)
    told = f"{tmp_path / 'out'} exists already and is not touched"
    assert [type(one) for one in done] == [UsageError] * 3
    assert str(done[0]).startswith(told)
    assert str(done[2]).startswith(f"rank 2 on node2: {told}")
    free = shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    full = together(run, tmp_path / "new", 3, crews=soon)
    assert [type(one) for one in full] == [SpaceError] * 3
    assert not hidden(tmp_path)


def test_a_rank_that_cannot_write_names_node_and_path(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node has mounted the output's file system to read only: opening to write fails there."""
    opened = os.open

    def refusing(path: object, flags: int, *more: object, **named: object) -> int:
        if flags & os.O_CREAT and str(path).endswith("-2"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **named)

    monkeypatch.setattr(journal, "os", SimpleNamespace(**{**vars(os), "open": refusing}))
    done = together(run, tmp_path / "out", 3, crews={0: crew(0, 3, join_seconds=2)})
    assert isinstance(done[2], StorageError)
    assert str(done[2]).startswith(f"rank 2 on node2: {tmp_path / '.out.pma-partial'}")
    assert "Read-only file system" in str(done[2])
    assert "rank 2 did not come" in str(done[0])
    assert not hidden(tmp_path)


def test_launches_of_other_sizes_and_twice_the_same_rank(run: list[Path], tmp_path: Path) -> None:
    done = together(
        run, tmp_path / "out", 3, ranks=[0, 1], crews={0: crew(0, 3, join_seconds=1), 1: crew(1, 2)}
    )
    assert "rank 1 on node1 was started as one of 2 processes, rank 0 on node0 as one of 3" in str(done[1])
    twice = together(run, tmp_path / "out", 3, ranks=[0, 1, 1], crews={0: crew(0, 3, join_seconds=1)})
    assert any("is it started twice?" in str(one) for one in twice[1:])


def test_a_second_driver_is_refused_while_the_first_goes_on(
    run: list[Path],
    tmp_path: Path,
    expected: dict[str, bytes],
    written: Callable[[Callable[[int], None]], None],
) -> None:
    refused: list[Outcome] = []

    def before(number: int) -> None:
        if number == 3 and not refused:
            refused.extend(together(run, tmp_path / "out", 2, ranks=[0]))

    written(before)
    done = together(run, tmp_path / "out", 2)
    assert "is being written by process" in str(refused[0])
    assert isinstance(refused[0], UsageError)
    assert all(isinstance(one, engine.Merge) for one in done)
    assert weights(tmp_path / "out") == expected


def test_one_who_asks_for_the_lease_at_the_same_time_is_nothing_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is there when the folder is listed, and gone when it is looked at."""
    folder = make_staging_folder(tmp_path / "out")
    (folder / LEASE_FILE).write_text("{}")
    listed = [folder / LEASE_FILE, folder / f"{LEASE_FILE}.gone"]
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: listed)
    assert make_staging_folder(tmp_path / "out") == folder
    assert leftover_bytes(tmp_path / "out") >= 0
    listed[1].symlink_to("nowhere")
    with pytest.raises(UsageError, match="was not left by a merge"):
        make_staging_folder(tmp_path / "out")


def test_who_shows_no_sign_of_life_is_named(
    run: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: Callable[[Callable[[int], None]], None],
) -> None:
    """Rank 1 hangs in its first block, and its journal with it."""
    go_on = threading.Event()
    hangs = threading.Lock()

    def check(place: part_module.Place) -> None:
        with hangs:  # every save, and every file that is opened
            go_on.wait(30)

    monkeypatch.setattr(part_module.Place, "check", check)
    crews = {0: crew(0, 2, silent_seconds=0.5)}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(together, run, tmp_path / "out", 2, crews=crews, save_seconds=0.05)
        deadline = time.monotonic() + 20
        while (
            not any("failed" in path.read_text() for path in drivers(tmp_path))
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        go_on.set()
        done = waiting.result()
    assert isinstance(done[0], Interrupted)
    assert "of rank 1 on node1; its process or node is gone" in str(done[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dead", [0, 1])
def test_the_end_of_a_process_on_this_machine_is_noticed_at_once(
    run: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: Callable[[Callable[[int], None]], None],
    dead: int,
) -> None:
    """What a rank says of its process is true of one that has ended; the other one notices."""
    ends = subprocess.Popen(["sleep", "60"])
    process = {**this_process(), "pid": ends.pid}
    assert not is_gone(process)
    monkeypatch.setattr(lease if dead == 0 else part_module, "this_process", lambda: process)

    def before(number: int) -> None:
        ends.kill()
        ends.wait()
        time.sleep(0.1)

    written(before)
    crews = {0: crew(0, 2, join_seconds=2, silent_seconds=2)}
    done = together(run, tmp_path / "out", 2, crews=crews, save_seconds=0.01)
    assert is_gone(process)
    for other in ({**process, "pids": 1}, {**process, "host": "elsewhere"}, {}):
        assert not is_gone(other)
    assert isinstance(done[1 - dead], Interrupted)
    said = f"the end of process {ends.pid}" if dead == 0 else "the end of rank 1 on node1"
    assert said in str(done[1 - dead])


def test_who_was_killed_before_parts_were_handed_out_is_not_waited_for(
    run: list[Path], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Its lease and words are there when the next launch comes, whose rank 0 comes last."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    folder = make_staging_folder(tmp_path / "out")
    holder = {**this_process(), "pid": ended.pid, "token": "ab" * 16}
    (folder / LEASE_FILE).write_text(json.dumps(holder))
    words = Journal(folder, journal.driver_journal(holder["token"]), new=True)
    with plan(run) as planned:
        words.start({"who": "rank 0 on node0", "size": 2, "files": 2, "view": part_module.view(planned)})
    words.close()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(together, run, tmp_path / "out", 2, ranks=[1])
        time.sleep(0.3)
        leading = together(run, tmp_path / "out", 2, ranks=[0])
        done = [*leading, *first.result()]
    assert all(isinstance(one, engine.Merge) for one in done), done
    assert weights(tmp_path / "out") == expected
    assert not hidden(tmp_path)


def drivers(folder: Path) -> list[Path]:
    try:
        return list(staging_folder(folder / "out").glob(".pma-driver-*"))
    except FileNotFoundError:
        return []


def test_one_who_works_under_a_lease_that_was_broken_stops_and_writes_into_no_file_of_another(
    run: list[Path], tmp_path: Path
) -> None:
    """A driver was killed; its rank 1 lives on, and the same output is made anew from other sources."""
    out = tmp_path / "out"
    with plan(run) as planned, plan(run[1:]) as another, pytest.raises(Interrupted):
        driver = Driver(planned, (), crew(0, 1))
        with attempt(planned, out, agree=driver.meet) as first:
            place = part_module.Place(out, first.token, silent_seconds=60)
            working = part_module.Working(place, "1", "rank 1")
            working.take(planned)
            working.agree()
            os.close(first._lease._descriptor)  # as a kill lets go of its lock
            first._lease._descriptor = os.open(os.devnull, os.O_RDONLY)
            second = Building(another, out)
            second.begin(fresh=True)
            zeros = {path: path.read_bytes() for path in second.folder.glob("*.safetensors")}
            assert zeros
            assert not any(map(any, zeros.values()))
            try:
                working.carry_out(planned.partition(1)[0])
            finally:
                assert {path: path.read_bytes() for path in zeros} == zeros
                working.close()
                second.close()
                driver.close()


def test_a_driver_with_workers_of_its_own(
    run: list[Path], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """The steps one by one, as an engine takes them that starts workers where it likes, and again."""
    out, stop = tmp_path / "out", StopFlag()
    with plan(run) as planned:
        driver = Driver(planned, (), crew(0, 1))
        with attempt(planned, out, agree=driver.meet) as building, kept_up([building, driver], stop):
            parts = planned.partition(3)
            with pytest.raises(StorageError, match="tell of 0 of"):
                commit(building)
            for number in (2, 0, 1):
                with plan(run) as theirs:
                    name, who = f"{number}-0", f"worker {number}"
                    made = carry_out(lambda: theirs, parts[number], out, building.token, name=name, who=who)
                assert set(made) == {planned.blocks[n].chunk for n in parts[number]}
                building.hear(made)
            with plan(run) as theirs:  # tried again: there is nothing left to do
                again = carry_out(lambda: theirs, parts[1], out, building.token, name="1-1", who="worker 1")
            building.hear(again)
            with plan(run[1:]) as theirs, pytest.raises(MismatchError, match="worker 4"):
                carry_out(lambda: theirs, parts[1], out, building.token, name="1-2", who="worker 4")
        with attempt(planned, out, agree=driver.meet) as building:
            assert building.bytes_done == planned.bytes_to_write  # from the workers' journals
            commit(building)
        driver.close()
    assert weights(out) == expected


def test_a_part_that_was_called_off_stops_and_the_others_go_on(run: list[Path], tmp_path: Path) -> None:
    """It was silent for long, and another was given what it makes."""
    out, stop = tmp_path / "out", StopFlag()
    with plan(run) as planned, pytest.raises(StorageError, match="tell of"):
        driver = Driver(planned, (), crew(0, 1))
        with attempt(planned, out, agree=driver.meet) as building, kept_up([building, driver], stop):
            parts = planned.partition(2)
            driver.call_off("0-0")
            for name in ("0-0", "1-0"):
                with plan(run) as theirs:
                    carry = partial(
                        carry_out, lambda: theirs, parts[0], out, building.token, name=name, who="node7"
                    )
                    if name == "0-0":
                        with pytest.raises(Interrupted, match="no sign of life was seen for long"):
                            carry()
                        assert not any(map(any, files_of(building).values()))
                    else:
                        building.hear(carry())
            assert any(map(any, files_of(building).values()))
            commit(building)


def test_what_takes_long_beside_blocks_shows_signs_of_life(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part's process plans, makes its files ready, and looks at its sources again in the end."""
    out, seen = tmp_path / "out", []
    unchanged, hand_for = provenance.check_unchanged, part_module.Working._hand_for

    def await_sign(what: str) -> None:
        journal = Followed(journals_of_others(staging_folder(out), building.token)[-1])
        deadline = time.monotonic() + 20
        while journal.changes < 3 and time.monotonic() < deadline:
            journal.news()
            time.sleep(0.01)
        seen.append((what, journal.changes))

    def slow_plan() -> engine.Plan:
        await_sign("plan")
        return planned

    def slow_check(planned: engine.Plan) -> None:
        await_sign("sources")
        unchanged(planned)

    def slow_hand(working: part_module.Working, *arguments: object, **how: bool) -> object:
        await_sign("files")
        return hand_for(working, *arguments, **how)

    with plan(run) as planned:
        driver = Driver(planned, (), crew(0, 1))
        with attempt(planned, out, agree=driver.meet) as building:
            monkeypatch.setattr(provenance, "check_unchanged", slow_check)
            monkeypatch.setattr(part_module.Working, "_hand_for", slow_hand)
            part = planned.partition(1)[0]
            how = {"name": "0-0", "who": "node7", "save_seconds": 0.05}
            made = carry_out(slow_plan, part, out, building.token, **how)
            building.hear(made)
            monkeypatch.undo()
    assert seen == [("plan", 3), ("files", 3), ("sources", 3)]


def test_what_a_node_leaves_that_ends_while_it_tries_to_write_is_removed(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(path: Path) -> None:
        raise SystemExit

    out = tmp_path / "out"
    with plan(run) as planned:
        driver = Driver(planned, (), crew(0, 1))
        with attempt(planned, out, agree=driver.meet) as building:
            place = part_module.Place(out, building.token, silent_seconds=60)
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(os, "unlink", ends)
                task._try_to_write(place)
            assert len(journals_of_others(building.folder, building.token)) == 2  # the driver's is another
            part = planned.partition(1)[0]
            how = {"name": "0-0", "who": "node7"}
            building.hear(carry_out(lambda: planned, part, out, building.token, **how))
            commit(building)
    assert hidden(out) == []


def files_of(building: Building) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in building.folder.glob("*.safetensors")}


@pytest.mark.parametrize("let_go", [True, False])
def test_a_lease_of_another_host_is_taken_if_it_was_let_go(tmp_path: Path, let_go: bool) -> None:
    lease = Lease(tmp_path, tmp_path / "out")
    path = tmp_path / LEASE_FILE
    lease._holder["host"] = "elsewhere"
    if let_go:
        lease.release()
    else:
        path.write_text(json.dumps(lease._holder))
        os.close(lease._descriptor)
    assert json.loads(path.read_text())["host"] == "elsewhere"
    if let_go:
        Lease(tmp_path, tmp_path / "out").release()
    else:
        with pytest.raises(UsageError, match=r"on elsewhere \(another host.*--break-lock"):
            Lease(tmp_path, tmp_path / "out")


ENVIRONMENTS = [
    ({}, None),
    ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script
    ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, (5, 8)),
    ({"RANK": "9", "WORLD_SIZE": "16", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (9, 16)),
]


@pytest.mark.parametrize(("environment", "expected"), ENVIRONMENTS)
def test_launchers(environment: dict[str, str], expected: tuple[int, int] | None) -> None:
    found = engine.crew_from(environment)
    assert (None if found is None else (found.rank, found.size)) == expected


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [("x", "2", "RANK=x"), ("2", "2", "rank 2 of 2"), ("0", "-1", "WORLD_SIZE=-1")],
)
def test_launchers_that_make_no_sense(rank: str, size: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.crew_from({"RANK": rank, "WORLD_SIZE": size})
