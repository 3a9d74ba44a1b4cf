"""`pma watch`: with a real model, stopped and started again; scalars; mistakes."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pma import verbs
from pma.cli import app
from pma.testing import tiny_llama_run, tiny_run
from pma.verbs import Candidate, Choice


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    tiny_llama_run(folder / "run", steps=4)
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(12)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(sentences))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pma(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


def watched(folder: Path, *arguments: object) -> dict[str, Any]:
    done = pma(
        "watch", folder / "run", "--once", "--json", "--text", folder / "text.txt", "--cloze", 0, *arguments
    )
    assert done.exit_code == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_losses_are_those_of_pma_eval_and_pma_sweep_finds_them(folder: Path) -> None:
    value = watched(folder, "--last", 3, "--scheme", "wma")
    assert [point["step"] for point in value["points"]] == [10, 20, 30, 40]
    assert value["points"][-1]["window"] == [20, 30, 40]
    documents = verbs.held_out_documents([folder / "text.txt"], folder)
    window = Choice(paths=(folder / "run",), window=verbs.Window(last=3))
    raw = Choice(paths=(folder / "run" / "checkpoint-40",))
    candidates = [
        Candidate(name="raw", choice=raw),
        Candidate(name="wma", choice=window, options=verbs.MergeOptions(scheme="wma")),
    ]
    last, merged = verbs.evaluate(candidates, documents, cloze=0)
    values = value["points"][-1]["values"]
    assert values["loss_last"] == last.loss.value
    assert values["loss_merged"] == merged.loss.value
    assert values["gain"] == pytest.approx(last.loss.value - merged.loss.value, abs=1e-12)
    text = ("--text", folder / "text.txt", "--cloze", 0, "--json")
    swept = pma("sweep", folder / "run", "--last", "3", "--scheme", "wma", *text)
    assert json.loads(swept.stdout)["from_store"] == 2
    assert watched(folder, "--last", 3, "--scheme", "wma")["added"] == 0


def test_scalars_are_in_event_files(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    value = watched(folder, "--last", 2, "--out", folder / "out")
    events = EventAccumulator(str(folder / "out" / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        f"pma/{name}" for name in ("gain", "gain_error", "loss_last", "loss_merged")
    ]
    for name in ("loss_last", "loss_merged", "gain"):
        expected = {p["step"]: p["values"][name] for p in value["points"] if name in p["values"]}
        found = {event.step: event.value for event in events.Scalars(f"pma/{name}")}
        assert found == pytest.approx(expected, rel=1e-6)


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stderr is not None
    yield from process.stderr


def next_point(lines: Iterator[str]) -> int:
    """The step of the next point that the watch tells."""
    event = next(line for line in lines if line.startswith("{"))
    return int(json.loads(event)["step"])


def test_a_watch_that_is_stopped_goes_on_with_the_same_command(folder: Path) -> None:
    later = folder / "later"
    (folder / "run" / "checkpoint-40").rename(later)
    command = [sys.executable, "-m", "pma", "watch", str(folder / "run"), "--poll", "0.1", "--cloze", "0"]
    command += ["--text", str(folder / "text.txt"), "--last", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = lines_of(process)
        assert [next_point(lines) for _ in range(3)] == [30, 20, 10]
        later.rename(folder / "run" / "checkpoint-40")
        assert next_point(lines) == 40
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    value = json.loads(out)
    assert value["interrupted"]
    assert [point["step"] for point in value["points"]] == [10, 20, 30, 40]
    assert "The watch is over" in Path(value["report"]).read_text()
    again = watched(folder, "--last", 2)
    assert (again["added"], again["points"]) == (0, value["points"])


def test_ctrl_c_while_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "text.txt").write_text("some words")
    command = [sys.executable, "-m", "pma", "watch", str(tmp_path / "run"), "--json"]
    command += ["--text", str(tmp_path / "text.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = lines_of(process)
        told = next(line for line in lines if line.startswith("page: "))
        page = Path(told.removeprefix("page: ").strip())
        until = time.monotonic() + 60
        while not page.exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert json.loads(out)["points"] == []
    assert "Traceback" not in errors
    assert "The watch is over" in page.read_text()


def test_what_people_see(folder: Path) -> None:
    done = pma(
        "watch", folder / "run", "--once", "--text", folder / "text.txt", "--cloze", 0, "--keep-window"
    )
    assert done.exit_code == 0, done.stderr
    assert "Step 40, 4K tokens: the raw checkpoint's held-out loss is" in done.stderr
    assert "step 10: no merge: there are no more before it" in done.stderr
    assert "4 points, 4 of them new" in done.stdout
    assert "4: steps 10 to 40" in done.stdout
    assert (folder / "run" / ".pma" / "kept" / "checkpoint-10" / "model.safetensors").is_file()


def test_mistakes_are_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny_run(tmp_path / "run", steps=2)
    text = tmp_path / "text.txt"
    text.write_text("some words\n<|endoftext|>\nand others")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for run, arguments, status, words in (
            ("missing", ["--text", text], 3, "is no folder"),
            ("empty", ["--text", text, "--once"], 3, "holds no complete checkpoint yet"),
            ("run", [], 3, "--text"),
            ("run", ["--text", tmp_path / "none"], 3, "does not exist"),
            ("run", ["--text", text, "--last", "1"], 2, "--last"),
            ("run/checkpoint-10", ["--text", text, "--once"], 2, "is one checkpoint"),
            ("run", ["--text", text, "--scheme", "best"], 2, "is not known"),
            ("run", ["--text", text, "--every", "x"], 2, "is not understood"),
            ("run", ["--text", text, "--pattern", "("], 2, "no regular expression|not a regular expression"),
            ("run", ["--text", text, "--wandb", "mine"], 2, r"pip install 'pma-llm\[wandb\]'"),
            ("run", ["--text", text, "--weights", "a=1"], 2, "--weights weighs --tasks"),
            ("run", ["--text", text, "--port", port], 2, f"--port {port} cannot be used"),
            ("run", ["--text", text, "--once"], 3, "cannot be evaluated"),
        ):
            done = pma("watch", tmp_path / run, *arguments)
            assert done.exit_code == status, (arguments, done.stderr)
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith("pma: ")

            assert re.search(words, last), last
            assert "Traceback" not in done.stderr
