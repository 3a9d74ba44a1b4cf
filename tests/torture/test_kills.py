"""SIGKILL at random moments, also of resumes: nothing ever looks complete that is not, journals tell the
truth, and the last resume gives the same bits.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pma.engine.staging import staging_folder
from pma.testing import tiny_run

from .checks import Weights, check_complete, check_journal, weights_of

# seven chunks
SHAPES = {"a": (5_000_000,), "b": (3_000_001,), "c": (4_900_000,)}
SCHEMES = {"merge": ["sma"], "sweep": ["sma", "wma", "ema:0.2"]}
KILLS = {"merge": 60, "sweep": 40}


class Server:
    """See `fork_server.py`."""

    def __init__(self, folder: Path) -> None:
        warm = {
            "sources": [str(path) for path in tiny_run(folder / "tiny", steps=3)],
            "schemes": SCHEMES["sweep"],
            "outs": [str(folder / f"warm{i}") for i in range(3)],
            "threads": 1,
        }
        script = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.ask(warm)["ready"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_run(tmp_path_factory.mktemp("sources") / "run", steps=3, shapes=SHAPES)


@dataclass
class Tally:
    """What the kills met."""

    kills: int = 0
    kills_of_resumes: int = 0  # of attempts that had found journaled chunks
    outputs_finished_before_the_kill: int = 0
    resumed_bytes: int = 0
    finished_with_resumed: int = 0
    outputs: int = 0


@pytest.mark.parametrize("what", ["merge", "sweep"])
def test_killed_again_and_again(
    tmp_path: Path,
    quick_folder: Path,
    server: Server,
    sources: list[Path],
    chance: random.Random,
    multiplier: int,
    what: str,
) -> None:
    """Merges on the disk; sweeps in memory, where syncs do not take most of the time."""
    here = tmp_path if what == "merge" else quick_folder
    job = {"sources": [str(path) for path in sources], "schemes": SCHEMES[what], "threads": 2}
    seconds = 1e9
    for attempt in range(4):  # the quickest: a busy disk now and then takes several times as long
        outs = [here / f"reference{attempt}-{k}" for k in range(len(SCHEMES[what]))]
        whole = server.ask({**job, "outs": [str(out) for out in outs], "kill_after_seconds": None})
        seconds = min(seconds, whole["seconds"])
        expected = [weights_of(out) for out in outs]
    assert all(expected)
    tally, wanted = Tally(), KILLS[what] * multiplier
    while tally.kills < wanted:
        folder = here / "work"
        folder.mkdir()
        targets = {folder / f"out{k}": weights for k, weights in enumerate(expected)}
        _kill_until_finished(server, job, targets, chance, seconds * 1.1, tally, at_most=wanted - tally.kills)
        shutil.rmtree(folder)
    print(f"\n{what}: {seconds * 1000:.0f} ms uninterrupted; {tally}")
    assert tally.kills == wanted
    # or these kills would have tested nothing
    assert tally.finished_with_resumed > tally.outputs / 4
    assert tally.kills_of_resumes > tally.kills / 20


def _kill_until_finished(
    server: Server,
    job: dict[str, Any],
    outs: dict[Path, Weights],
    chance: random.Random,
    seconds: float,
    tally: Tally,
    *,
    at_most: int,
) -> None:
    """Several kills in a row of one command, then one attempt that is left alone."""
    folder = next(iter(outs)).parent
    job = {**job, "outs": [str(out) for out in outs]}
    tally.outputs += 1
    for _ in range(min(at_most, chance.randint(2, 6))):
        journaled = sum(check_journal(staging_folder(out)) for out in outs)
        kill_after = chance.uniform(0, seconds)
        done = server.ask({**job, "threads": chance.randint(1, 2), "kill_after_seconds": kill_after})
        found = check_complete(folder, outs)
        if not done["killed"]:
            tally.resumed_bytes += done["bytes_resumed"]
            tally.finished_with_resumed += done["bytes_resumed"] > 0
            assert set(found) == set(outs)
            break
        tally.kills += 1
        tally.kills_of_resumes += journaled > 0
        tally.outputs_finished_before_the_kill += len(found)
        for out in outs:
            check_journal(staging_folder(out))
    if not all(out.exists() for out in outs):
        done = server.ask({**job, "kill_after_seconds": None})
        tally.resumed_bytes += done["bytes_resumed"]
        tally.finished_with_resumed += done["bytes_resumed"] > 0
    assert set(check_complete(folder, outs)) == set(outs)
    assert not [path for path in folder.iterdir() if path not in outs]
