"""`--on ray` as this process sees it, with a stand-in for Ray; clusters are started in tests/torture."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pma.cli import app
from pma.cli.on_ray import Evaluating, evaluating
from pma.cluster import OnRay, connected
from pma.testing import tiny_llama_run, tiny_run

fsspec = pytest.importorskip("fsspec", reason="stores are read through fsspec")

NOBODY = "127.0.0.1:9"  # where no cluster answers


@pytest.fixture(autouse=True)
def _ray(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        is_initialized=lambda: False, init=lambda **_: None, shutdown=lambda: None, nodes=list
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def memory() -> Iterator[Any]:
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=4)
    return tmp_path / "run"


@pytest.fixture
def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk of this machine has room."""
    free = shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, at: str = NOBODY) -> str:
    """What a command on Ray failed with, in one paragraph."""
    done = pma(*arguments, "--on", "ray", "--ray-address", at)
    assert isinstance(done.exception, SystemExit), done.exception
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.usefixtures("_full")
def test_what_nodes_send_to_a_store_needs_no_room_here(run: Path, tmp_path: Path, memory: Any) -> None:
    merge = ("merge", run, "--last", 3, "-o")
    assert "no Ray cluster answers" in refused(*merge, "memory://merged")
    assert "1B free, the output needs" in refused(*merge, tmp_path / "merged")


@pytest.mark.usefixtures("_full")
def test_what_is_wrong_with_a_place_in_a_store_is_told_before_a_cluster_is_asked(
    run: Path, memory: Any
) -> None:
    memory.pipe_file("/merged/theirs.txt", b"precious")
    merge = ("merge", run, "--last", 3, "-o", "memory://merged")
    assert "memory://merged exists already and is not touched" in refused(*merge)
    memory.rm("/merged", recursive=True)
    memory.pipe_file("/merged/.pma-unfinished", b'{"plan": "of another merge"}')
    assert "an earlier merge to memory://merged was interrupted" in refused(*merge)


@pytest.mark.usefixtures("_full", "memory")
def test_a_sweep_that_is_sent_to_a_store_needs_no_room_here(run: Path, tmp_path: Path) -> None:
    write = ("sweep", run, "--last", "2,3", "--write")
    assert "no Ray cluster answers" in refused(*write, "memory://swept")
    assert "1B free, the output needs" in refused(*write, tmp_path / "swept")


@pytest.mark.parametrize(
    "command",
    [
        "sweep --search --last 2,3 --best none --budget 9",
        "sweep --last 2,3 --cloze 0",
        "eval --merge --last 3 --cloze 0",
    ],
)
def test_results_go_to_stdout_and_what_ray_prints_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    tiny_llama_run(tmp_path / "run", steps=4)
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"{i} times {i} is {i * i}." for i in range(24)))

    @contextmanager
    def connected_here(on: OnRay, **how: Any) -> Iterator[Evaluating]:
        with connected(on), evaluating(None, **how) as here:
            sys.stdout.write("Ray lost a node\n")
            yield here

    monkeypatch.setattr("pma.cli.sweeping.evaluating", connected_here)
    monkeypatch.setattr("pma.cli.evaluating.evaluating", connected_here)
    name, *flags = command.split()
    done = pma(name, tmp_path / "run", *flags, "--text", text, "--on", "ray")
    assert done.exit_code == 0, done.stderr
    assert "loss" in done.stdout
    assert "Ray lost a node" in done.stderr
    assert "Ray lost a node" not in done.stdout


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".com", "\udcff"])
def test_what_is_no_name_of_a_host_is_a_mistake(run: Path, tmp_path: Path, host: str) -> None:
    merge = ("merge", run, "--last", 3, "-o", tmp_path / "merged")
    assert "expected HOST:PORT, as 10.0.0.1:6379" in refused(*merge, at=f"{host}:6379")


def test_an_empty_address_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys.modules["ray"], "init", lambda address, **_: asked.append(address))
    monkeypatch.setenv("RAY_ADDRESS", "")
    with connected(OnRay()):
        pass
    assert asked == ["auto"]
