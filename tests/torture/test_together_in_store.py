"""SIGKILL of some of the processes that send one output to a store, or of all: nothing there looks complete
before it is, every file that arrived stays, and any number of processes goes on to the same bits.
"""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from pma import engine, formats
from pma.formats.contracts import UNFINISHED_FILE
from pma.remote import location
from pma.testing import tiny_run

from ..remote.conftest import Bucket, bucket, started_server
from .checks import weights_of
from .crews import Server

# fixtures
__all__ = ["bucket", "started_server"]

SHAPES = dict.fromkeys("abcdefgh", (1_000_000,))  # eight files of 2 MB
KILLS = 12
MOST_OUTPUTS = 60
# a journal in a store is silent for two seconds and a bit; the end of a process is noticed at once
PATIENT_SECONDS, IMPATIENT_SECONDS = 60.0, 5.0


@pytest.fixture
def server(tmp_path: Path, bucket: Bucket) -> Iterator[Server]:
    """With the environment that leads to the bucket."""
    server = Server(tmp_path, slower_seconds=0.2, driver="s3fs")
    yield server
    server.close()


class Target:
    """An output in a bucket, and what must hold of it."""

    def __init__(self, bucket: Bucket, name: str, expected: dict[str, str]) -> None:
        self._bucket, self._name, self._expected = bucket, name, expected
        self.url = f"{bucket.url}/{name}"

    def check(self) -> bool:
        """Whether it is finished; it is told so only where it is. Files that arrived are right."""
        files = self._bucket.files(self._name)
        weights = {n: blake3(data).hexdigest() for n, data in files.items() if n.endswith(".safetensors")}
        assert weights.items() <= self._expected.items()
        if "pma.json" in files:
            assert weights == self._expected
            assert engine.verify(location(self.url)).findings == ()
            return True
        if files:
            assert UNFINISHED_FILE in files
            assert formats.read_meta(location(self.url)).incomplete is not None
        return False

    def arrived(self) -> int:
        """How many files journals tell of."""
        words = [data for name, data in self._bucket.files(self._name).items() if name.startswith(".pma-")]
        return max((line.count(b'"stamp"') for data in words for line in data.splitlines()), default=0)

    @contextmanager
    def told_once_arrived(self, least: int, path: Path) -> Iterator[Path]:
        """A file that exists from when as many files of the output arrived on."""
        over = threading.Event()

        def watch() -> None:
            arrived = 0
            while not over.is_set() and arrived < least:
                time.sleep(0.05)
                with suppress(FileNotFoundError):  # listed, and then replaced or cleared
                    arrived = self.arrived()
            path.touch()

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield path
        finally:
            over.set()
            watching.join()
            path.unlink()

    def check_finished(self) -> None:
        """Nothing lies beside it."""
        assert self.check()
        beside = [name for name in self._bucket.files(self._name) if name.startswith(".")]
        assert beside == []
        told = json.loads(self._bucket.files(self._name)["pma.json"])
        assert {output["name"] for output in told["outputs"]} == set(self._expected)


@dataclass
class Tally:
    kills: int = 0
    of_rank_0: int = 0
    stopped_by_themselves: int = 0
    resumed: int = 0


def kill_ranks(
    target: Target, server: Server, job: dict[str, Any], chance: random.Random, tally: Tally
) -> int:
    """One launch, of which a rank or two are killed. Returns how many files it leaves to go on with."""
    size = chance.choice((2, 3, 4))
    victims = chance.sample(range(size), chance.randint(1, 2))
    # by the clock alone a slow machine has nothing to go on with, and a fast one is through
    least = chance.choice((0, 1, 2, 4))
    within = 2.0 if least == 0 else 0.2
    how = {
        "size": size,
        "kills": {str(rank): chance.uniform(0, within) for rank in victims},
        "all_after": chance.choice((None, 0.0, 0.1)),
        "silent_seconds": IMPATIENT_SECONDS,
    }
    with target.told_once_arrived(least, Path(job["staging"]).with_name("enough")) as once:
        done = server.ask({**job, **how, "out": target.url, "once": str(once)})
    tally.kills += len(set(done["killed"]) & set(victims))
    tally.of_rank_0 += 0 in done["killed"]
    tally.stopped_by_themselves += sum(isinstance(said, str) for said in done["outcomes"].values())
    return 0 if target.check() else target.arrived()


def finish(target: Target, server: Server, job: dict[str, Any], size: int, arrived: int) -> bool:
    """One launch of which none is killed. Returns whether it goes on with what was there."""
    said = server.ask({**job, "out": target.url, "size": size})["outcomes"]["0"]
    target.check_finished()
    if size == 1:  # it builds all again, and refuses what is finished
        assert said == 0 or "exists already" in str(said)
        return False
    assert isinstance(said, int), said
    assert said > 0 or not arrived
    return arrived > 0


def test_ranks_killed_while_they_send(
    tmp_path: Path, bucket: Bucket, server: Server, chance: random.Random, multiplier: int
) -> None:
    sources = tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=len(SHAPES))
    staging = tmp_path / "staging-of-ranks"
    job: dict[str, Any] = {"sources": [str(path) for path in sources], "kills": {}, "all_after": None}
    server.ask({**job, "out": str(tmp_path / "one"), "size": 1})
    expected = weights_of(tmp_path / "one")
    job |= {"staging": str(staging), "silent_seconds": PATIENT_SECONDS}
    whole = Target(bucket, "whole", expected)
    assert not finish(whole, server, job, size=3, arrived=0)
    tally, outputs = Tally(), 0
    # kills that all miss, or none of which rank 0 meets, would test nothing
    while tally.kills < KILLS * multiplier or not (tally.resumed and tally.of_rank_0):
        target = Target(bucket, f"out-{outputs}", expected)
        outputs += 1
        for _ in range(chance.randint(1, 3)):
            arrived = kill_ranks(target, server, job, chance, tally)
            if target.check():
                break
        tally.resumed += finish(target, server, job, chance.choice((1, 2, 3)), arrived)
        assert [path for path in staging.rglob("*") if path.is_file()] == []
        assert outputs < MOST_OUTPUTS * multiplier, tally
    print(f"\n{tally}, {outputs} outputs in a store")
