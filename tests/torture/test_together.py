"""SIGKILL of some of the processes that write one output, or of all: nothing looks complete before it is,
every journal tells the truth, the others stop, and any number of processes goes on to the same bits.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from pma.engine import blocks
from pma.engine.journal import Followed, journals_of_others
from pma.engine.staging import staging_folder
from pma.testing import tiny_run

from .checks import check_complete, check_finished, check_journal, weights_of
from .crews import Server

SHAPES = {"a": (9_000_000,), "b": (3_000_001,), "c": (8_900_000,)}  # ten chunks
KILLS = 20
LEAST_RESUMED = 2
PATIENT_SECONDS, IMPATIENT_SECONDS = 60.0, 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def check_journals_of_others(folder: Path) -> int:
    """Every chunk that a rank's journal calls done has those bytes. Returns how many."""
    paths = journals_of_others(folder) if folder.is_dir() else []
    found = {chunk: digest for path in paths for chunk, digest in Followed(path).news().items()}
    if not all((folder / name).is_file() for name, _ in found):
        return 0  # it was being cleared
    for (name, number), digest in found.items():
        with (folder / name).open("rb") as file:
            file.seek(number * blocks.CHUNK_BYTES)
            assert blake3(file.read(blocks.CHUNK_BYTES)).hexdigest() == digest, (name, number)
    return len(found)


def test_ranks_killed_again_and_again(
    tmp_path: Path, quick_folder: Path, server: Server, chance: random.Random, multiplier: int
) -> None:
    sources = tiny_run(tmp_path / "run", steps=3, shapes=SHAPES, shards=2)
    job = {"sources": [str(path) for path in sources], "kills": {}, "all_after": None}
    whole = server.ask({**job, "out": str(tmp_path / "one"), "size": 1})
    expected, seconds = weights_of(tmp_path / "one"), whole["seconds"]
    assert expected
    kills = resumed = outputs = told = 0
    # kills that leave nothing to go on with, or that nobody notices, would test nothing
    while kills < KILLS * multiplier or ((resumed < LEAST_RESUMED or not told) and kills < 5 * KILLS):
        folder = quick_folder / "work"
        folder.mkdir()
        out = folder / "out"
        outputs += 1
        for _ in range(chance.randint(1, 4)):
            size = chance.choice((1, 2, 3, 4))
            victims = chance.sample(range(size), chance.randint(1, size))
            times = {str(rank): chance.uniform(0.2, 1.2) * seconds for rank in victims}
            all_after = 0.0 if size == 1 else chance.choice((None, 0.0, 0.1))
            done = server.ask(
                {
                    **job,
                    "out": str(out),
                    "size": size,
                    "kills": times,
                    "all_after": all_after,
                    "silent_seconds": IMPATIENT_SECONDS,
                }
            )
            kills += len(set(done["killed"]) & set(victims))
            told += sum(isinstance(said, str) for said in done["outcomes"].values())
            check_complete(folder, {out: expected})
            journaled = check_journal(staging_folder(out)) + check_journals_of_others(staging_folder(out))
            if out.exists():
                break
        if not out.exists():
            size = chance.choice((1, 2, 3, 4))
            last = server.ask({**job, "out": str(out), "size": size, "silent_seconds": PATIENT_SECONDS})
            assert all(isinstance(said, int) for said in last["outcomes"].values()), last
            assert last["outcomes"]["0"] > 0 or not journaled
            resumed += journaled > 0
        check_finished(out, expected)
        assert [path for path in folder.iterdir() if path != out] == []
        shutil.rmtree(folder)
    print(
        f"\n{kills} kills of ranks, {outputs} outputs, {resumed} resumed; {told} ranks stopped by themselves"
    )
    assert resumed >= LEAST_RESUMED
    assert told > 0
