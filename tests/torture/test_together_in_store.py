"""SIGKILL of some of the processes that send one output to a store, or of all: nothing there looks complete
before it is, every file that arrived stays, and any number of processes goes on to the same bits.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

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
LEAST_RESUMED = 1
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

    def check_finished(self) -> None:
        """Nothing lies beside it."""
        assert self.check()
        beside = [name for name in self._bucket.files(self._name) if name.startswith(".")]
        assert beside == []
        told = json.loads(self._bucket.files(self._name)["pma.json"])
        assert {output["name"] for output in told["outputs"]} == set(self._expected)


def test_ranks_killed_while_they_send(
    tmp_path: Path, bucket: Bucket, server: Server, chance: random.Random, multiplier: int
) -> None:
    sources = tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=len(SHAPES))
    job = {"sources": [str(path) for path in sources], "kills": {}, "all_after": None}
    server.ask({**job, "out": str(tmp_path / "one"), "size": 1})
    expected = weights_of(tmp_path / "one")
    staging = tmp_path / "staging-of-ranks"
    job |= {"staging": str(staging), "silent_seconds": PATIENT_SECONDS}
    times_taken = []
    for name in ("timed-1", "timed-2"):  # the first has the server of the store warm up, too
        times_taken.append(server.ask({**job, "out": f"{bucket.url}/{name}", "size": 3})["seconds"])
        Target(bucket, name, expected).check_finished()
    seconds = min(times_taken)
    kills = leaders = resumed = outputs = told = 0
    while kills < KILLS * multiplier or (resumed < LEAST_RESUMED and kills < 3 * KILLS):
        target = Target(bucket, f"out-{outputs}", expected)
        outputs += 1
        arrived = 0
        for _ in range(chance.randint(1, 3)):
            size = chance.choice((2, 3, 4))
            victims = chance.sample(range(size), chance.randint(1, 2))
            times = {str(rank): chance.uniform(0.4, 1.0) * seconds for rank in victims}
            how = {"size": size, "kills": times, "all_after": chance.choice((None, 0.0, 0.1))}
            how |= {"silent_seconds": IMPATIENT_SECONDS}
            done = server.ask({**job, **how, "out": target.url})
            kills += len(set(done["killed"]) & set(victims))
            leaders += 0 in done["killed"]
            told += sum(isinstance(said, str) for said in done["outcomes"].values())
            if target.check():
                break
            arrived = target.arrived()
        size = chance.choice((1, 2, 3))
        said = server.ask({**job, "out": target.url, "size": size})["outcomes"]["0"]
        if size == 1:  # it builds all again, and refuses what is finished
            assert said == 0 or "exists already" in str(said)
        else:
            assert isinstance(said, int), said
            assert said > 0 or not arrived
            resumed += arrived > 0
        target.check_finished()
        assert [path for path in staging.rglob("*") if path.is_file()] == []
    print(
        f"\n{kills} kills of ranks, {leaders} of rank 0, {outputs} outputs in a store, {resumed} resumed; "
        f"{told} ranks stopped by themselves"
    )
    # or these kills would have tested nothing
    assert resumed >= LEAST_RESUMED
    assert leaders > 0
