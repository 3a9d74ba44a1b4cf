"""The power goes at any moment of a merge: whatever a disk may then hold, nothing looks complete that is not,
and the same command gives the same bits. `disk.py` says what a disk may hold.
"""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

import pytest

from pma import engine, trajectory
from pma.engine import MergeOptions, blocks, building, commit, lease, provenance, staging
from pma.engine.building import Building
from pma.engine.journal import Journal
from pma.engine.plan import Plan
from pma.engine.staging import staging_folder
from pma.errors import MismatchError, PmaError, UsageError
from pma.formats.folder_writer import FolderPart, FolderWriter
from pma.testing import tiny_run

from .calls import Calls
from .checks import (
    Targets,
    Weights,
    check_complete,
    check_finished,
    check_journal,
    weights_of,
    write_those_missing,
)
from .disk import put

SHAPES = {"a": (7_000,), "b": (61, 53), "c": (5_003,), "d": (3_000,), "e": ()}
SAMPLES = 5  # mixtures at each moment, times the multiplier


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, building, provenance):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(commit, "kept_up", _never_kept_up)


@contextmanager
def _never_kept_up(buildings: Sequence[Building], stop: threading.Event, seconds: float) -> Iterator[None]:
    yield


def _kept_up_every(writes: int) -> Callable[..., AbstractContextManager[None]]:
    """Saves after so many writes, not after some time: every recording is the same."""

    @contextmanager
    def kept_up(buildings: Sequence[Building], stop: threading.Event, seconds: float) -> Iterator[None]:
        written = count(1)
        for one in buildings:
            _save_after(one, buildings, lambda: next(written) % writes == 0)
        yield

    return kept_up


def _save_after(one: Building, buildings: Sequence[Building], due: Callable[[], bool]) -> None:
    """The block that is written is not yet known as done when all are saved: as with a timer."""
    assert one.output.part is not None
    write = one.output.part.write

    def write_and_save(file: str, offset_bytes: int, values: memoryview) -> None:
        write(file, offset_bytes, values)
        if due():
            for building in buildings:
                building.save()

    one.output.part.write = write_and_save  # type: ignore[method-assign]


class Stopped(Exception):
    """As a kill: nothing is tidied up."""


class Scenario:
    """A run, plans of it, what they give, and a folder that is recorded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.root = folder / "root"
        self.root.mkdir()
        paths = tiny_run(folder / "run", steps=3, shapes=SHAPES, shards=2)
        points = trajectory.from_checkpoints(paths).points
        options = {scheme: MergeOptions(scheme=scheme, threads=1) for scheme in ("sma", "wma")}
        self.plans = {scheme: engine.plan(points, one) for scheme, one in options.items()}
        self.expected = {scheme: self._reference(scheme) for scheme in options}

    def _reference(self, scheme: str) -> Weights:
        out = self.folder / scheme
        engine.write(self.plans[scheme], out)
        return weights_of(out)

    @contextmanager
    def recorded(self, save_every: int = 1) -> Iterator[Calls]:
        calls = Calls(self.root)
        with self._monkeypatch.context() as patched:
            patched.setattr(commit, "kept_up", _kept_up_every(save_every))
            calls.install(patched)
            yield calls
        calls.check_complete()

    def interrupted(self, scheme: str, out: Path, after_blocks: int) -> None:
        """An attempt that ends after some blocks and leaves what a kill leaves."""
        done: list[int] = []

        def stop(read: int, written: int) -> None:
            done.append(written)
            if len(done) == after_blocks:
                raise Stopped

        with pytest.raises(Stopped):
            engine.write(self.plans[scheme], out, progress=stop)
        assert check_journal(staging_folder(out)) > 0


@pytest.fixture
def scenario(quick_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scenario]:
    scenario = Scenario(quick_folder, monkeypatch)
    yield scenario
    for plan in scenario.plans.values():
        plan.close()


class Sweep:
    """Every crash of a trace, each made real once and checked."""

    def __init__(self, scenario: Scenario, calls: Calls, outs: dict[str, str], finishes: bool = True) -> None:
        """`outs`: path below root -> scheme. `finishes`: the command that was recorded succeeded."""
        self._scenario, self._trace = scenario, calls.trace
        self._outs, self._finishes = outs, finishes
        self._known: set[int] = set()
        self.resumed = self.finished = self.bytes_resumed = 0

    def run(self, chance: random.Random, multiplier: int) -> None:
        moments = len(self._trace.operations)
        for moment in range(moments + 1):
            for tree in self._trace.crashes(moment, chance, SAMPLES * multiplier):
                contents = tree.contents()
                known = hash(tuple(contents.items()))
                if known not in self._known:
                    self._known.add(known)
                    try:
                        self._check(contents)
                    except BaseException as error:
                        where = self._trace.operations[max(0, moment - 3) : moment]
                        listed = {path: data and len(data) for path, data in contents.items()}
                        error.add_note(f"power lost after operation {moment}: {where}\nleft: {listed}")
                        raise
                if moment == moments and self._finishes:  # what was reported as done stays done
                    assert set(self._outs) <= contents.keys(), sorted(contents)
        print(
            f"\n{moments} operations, {len(self._known)} different states: {self.finished} finished, "
            f"{self.resumed} resumed with {self.bytes_resumed} bytes"
        )
        assert self.bytes_resumed > 0

    def _check(self, contents: dict[str, bytes | None]) -> None:
        folder = self._scenario.folder / "crashed"
        folder.mkdir()
        put(contents, folder)
        targets = [(self._scenario.plans[scheme], folder / out) for out, scheme in self._outs.items()]
        expected = {folder / out: self._scenario.expected[scheme] for out, scheme in self._outs.items()}
        for out in check_complete(folder, expected):
            with pytest.raises(UsageError, match="exists already"):
                engine.write(next(plan for plan, path in targets if path == out), out, break_lock=True)
        for out in expected:
            check_journal(staging_folder(out))
        self._resume(targets)
        for out, weights in expected.items():
            check_finished(out, weights)
            assert not staging_folder(out).exists()
        shutil.rmtree(folder)

    def _resume(self, targets: Targets) -> None:
        if all(out.exists() for _, out in targets):
            self.finished += 1
            return
        try:
            resumed = write_those_missing(targets, break_lock=True)
        except UsageError as error:
            if "options were not the same" not in str(error):
                raise
            resumed = write_those_missing(targets, break_lock=True, fresh=True)
        self.resumed += resumed > 0
        self.bytes_resumed += resumed


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_merge(scenario: Scenario, chance: random.Random, multiplier: int, save_every: int) -> None:
    with scenario.recorded(save_every) as calls:
        engine.write(scenario.plans["sma"], scenario.root / "out")
    Sweep(scenario, calls, {"out": "sma"}).run(chance, multiplier)


def test_a_merge_into_new_folders(scenario: Scenario, chance: random.Random, multiplier: int) -> None:
    with scenario.recorded() as calls:
        engine.write(scenario.plans["sma"], scenario.root / "not" / "yet" / "out")
    Sweep(scenario, calls, {"not/yet/out": "sma"}).run(chance, multiplier)


def test_a_merge_that_was_killed_before(scenario: Scenario, chance: random.Random, multiplier: int) -> None:
    with scenario.recorded() as calls:
        scenario.interrupted("sma", scenario.root / "out", after_blocks=5)
        engine.write(scenario.plans["sma"], scenario.root / "out")
    Sweep(scenario, calls, {"out": "sma"}).run(chance, multiplier)


def test_a_fresh_merge_over_one_with_other_options(
    scenario: Scenario, chance: random.Random, multiplier: int
) -> None:
    with scenario.recorded() as calls:
        scenario.interrupted("wma", scenario.root / "out", after_blocks=8)
        engine.write(scenario.plans["sma"], scenario.root / "out", fresh=True)
    Sweep(scenario, calls, {"out": "sma"}).run(chance, multiplier)


def _changed(plan: Plan) -> None:
    raise MismatchError("a source was changed")


def test_a_merge_that_fails_and_clears_up(
    scenario: Scenario, chance: random.Random, multiplier: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scenario.recorded() as calls, monkeypatch.context() as patched, pytest.raises(MismatchError):
        patched.setattr(provenance, "check_unchanged", _changed)
        engine.write(scenario.plans["sma"], scenario.root / "out")
    assert list(scenario.root.iterdir()) == []
    Sweep(scenario, calls, {"out": "sma"}, finishes=False).run(chance, multiplier)


def test_a_sweep(scenario: Scenario, chance: random.Random, multiplier: int) -> None:
    with scenario.recorded(save_every=4) as calls:
        targets = [(plan, scenario.root / scheme) for scheme, plan in scenario.plans.items()]
        assert write_those_missing(targets) == 0
    Sweep(scenario, calls, {"sma": "sma", "wma": "wma"}).run(chance, multiplier)


def test_after_a_restart_only_with_break_lock(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scenario.root / "out"
    monkeypatch.setattr(commit, "kept_up", _kept_up_every(1))
    scenario.interrupted("sma", out, after_blocks=5)
    before = sorted(path.name for path in staging_folder(out).iterdir())
    left = staging_folder(out) / lease.LEASE_FILE
    holder = json.loads(left.read_text())
    assert holder.pop("released")  # which a process that loses its power does not get to say
    left.write_text(json.dumps(holder))
    monkeypatch.setattr(lease, "boot", lambda: "another boot")
    with pytest.raises(UsageError, match=r"before a restart.*--break-lock"):
        engine.write(scenario.plans["sma"], out)
    assert sorted(path.name for path in staging_folder(out).iterdir()) == before
    assert engine.write(scenario.plans["sma"], out, break_lock=True).bytes_resumed > 0
    check_finished(out, scenario.expected["sma"])


def _write_bytes_unsynced(writer: FolderWriter, name: str, data: bytes) -> None:
    descriptor = os.open(writer._folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.pwrite(descriptor, data, 0)
    os.close(descriptor)


def _start_unsynced(journal: Journal, heading: dict[str, object]) -> None:
    os.ftruncate(journal._descriptor, 0)
    journal.heading, journal.digests, journal._end = heading, {}, 0
    journal._append(heading)


def _discard_in_any_order(one: Building) -> None:
    staging.clear(one.folder, but=())
    one.folder.rmdir()


# each leaves one sync out, or an order: the model must notice
MUTANTS = {
    "journal before data": (FolderPart, "sync", lambda part: None),
    "names not synced around the rename": (staging, "sync_folder", lambda folder: None),
    "small files not synced": (FolderWriter, "write_bytes", _write_bytes_unsynced),
    "new parents not synced": (
        staging,
        "_make_folders",
        lambda folder: folder.mkdir(parents=True, exist_ok=True),
    ),
    "an old journal not cut off": (Journal, "start", _start_unsynced),
    "lease removed before the rest": (Building, "discard", _discard_in_any_order),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_finds_what_is_not_synced(
    scenario: Scenario, chance: random.Random, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    out = scenario.root / "new" / "out"
    with monkeypatch.context() as patched:
        patched.setattr(*MUTANTS[mutant])
        with scenario.recorded(save_every=3) as calls:
            scenario.interrupted("wma", out, after_blocks=8)
            if "lease" in mutant:
                with monkeypatch.context() as failing, pytest.raises(MismatchError):
                    failing.setattr(provenance, "check_unchanged", _changed)
                    engine.write(scenario.plans["wma"], out)
            else:
                engine.write(scenario.plans["sma"], out, fresh=True)
    sweep = Sweep(scenario, calls, {"new/out": "sma"}, finishes="lease" not in mutant)
    with pytest.raises((AssertionError, PmaError)) as found:
        sweep.run(chance, 0)  # no mixtures: nothing lost, all lost, one lost, one kept find each of them
    print(f"\n{mutant}: {type(found.value).__name__}: {str(found.value)[:150]}")
