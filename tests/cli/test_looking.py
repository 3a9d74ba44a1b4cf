"""`pma diagnose --text`: what it adds to output, JSON, store and report, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pma.analysis import keeping, room
from pma.cli import app, looking
from pma.errors import MissingExtra
from pma.evaluation import model
from pma.reporting import report_folder
from pma.results import STORE_FILE
from pma.testing import tiny_llama_run, tiny_run
from pma.verbs import Choice, MergeOptions, Window

SMALL = keeping.Budget(
    text_characters=3_000,
    routing_tokens=128,
    derivative_tokens=128,
    plane_tokens=64,
    context_tokens=32,
    batches=3,
    plane_points=3,
)


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(looking, "Budget", lambda: SMALL)
    monkeypatch.setattr("pma.analysis.looking.Budget", lambda: SMALL)
    tiny_llama_run(tmp_path / "run", steps=3, spread=0.3)
    return tmp_path / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    documents = ["".join(map(chr, random.integers(97, 123, 80))) for _ in range(10)]
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def test_a_look_is_shown_kept_and_reported(run: Path, text: Path) -> None:
    shown = pma("diagnose", run, "--last", 3, "--text", text)
    assert shown.exit_code == 0, shown.stderr
    assert "only 10 documents" in shown.stderr
    for words in ("3 checkpoints, steps 10 to 30", "0.25", "Advised: ", "The plane goes through the merge"):
        assert words in shown.stdout, words
    again = pma("diagnose", run, "--last", 3, "--text", text)
    assert f"Known before, from {run / STORE_FILE}" in again.stdout
    value = json.loads(pma("diagnose", run, "--last", 3, "--text", text, "--json").stdout)
    assert value["look"]["steps"] == [10, 20, 30]
    assert value["whole"]["elements"] > 0
    ends = json.loads(
        pma("eval", run, "--merge", "--last", 3, "--text", text, "--cloze", 0, "--json").stdout
    )["comparison"]
    for name, row in zip(("last_loss", "merge_loss"), ends, strict=True):
        assert value["look"]["line"][name] == pytest.approx(row["loss"])
    page, _ = report_folder(run, run / "out")
    assert "Diagnosis: the plane of merge and last" in page.read_text()


def test_another_text_or_window_is_another_look(run: Path, text: Path, tmp_path: Path) -> None:
    store = tmp_path / "elsewhere.sqlite"
    how = ("--store", store, "--json")
    first = json.loads(pma("diagnose", run, "--last", 3, "--text", text, *how).stdout)["look"]
    fewer = json.loads(pma("diagnose", run, "--last", 2, "--text", text, *how).stdout)["look"]
    text.write_text(text.read_text().replace("a", "b"))
    other = json.loads(pma("diagnose", run, "--last", 3, "--text", text, *how).stdout)["look"]
    assert first["line"]["merge_loss"] != other["line"]["merge_loss"]
    assert fewer["steps"] == [20, 30]
    assert "lie on a line" in fewer["left_out"]["contours"]
    assert not (run / STORE_FILE).exists()


def test_a_step_beyond_is_written_by_the_command_that_is_told(run: Path, text: Path, tmp_path: Path) -> None:
    """Not of these models, whose merge may be the best: of what a look would tell of others."""
    look = json.loads(pma("diagnose", run, "--last", 3, "--text", text, "--json").stdout)["look"]
    plan = looking.planned(Choice(paths=(run,), window=Window(last=3)), MergeOptions(), [text], None)
    look["line"] |= {"t": 1.5, "gain_over_merge": look["line"]["gain"]}
    look["line_weights"] = [0.5, 0.5, 0.0]
    shown = _shown(plan, look)
    line = next(row for row in shown.splitlines() if row.startswith("To write it: "))
    words = line.removeprefix("To write it: pma ").replace("OUT", str(tmp_path / "out")).split()
    assert pma(*words).exit_code == 0
    record = json.loads((tmp_path / "out" / "pma.json").read_text())
    assert [source["weight"] for source in record["sources"]] == [0.5, 0.5, 0.0]


def _shown(plan: looking.Planned, look: dict[str, object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        looking.show(plan, look)
    return out.getvalue()


def failed(result: Result, status: int) -> str:
    assert result.exit_code == status, result.stdout
    assert "Traceback" not in result.stderr
    assert result.stdout == ""  # found before anything was done
    return result.stderr.strip().splitlines()[-1]


def test_bad_input_is_told_before_anything_is_read(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one document")
    assert "1 different documents, expected at least 4" in failed(pma("diagnose", run, "--text", short), 3)
    assert "does not exist" in failed(pma("diagnose", run, "--text", tmp_path / "no"), 3)
    assert "a window of one checkpoint" in failed(pma("diagnose", run, "--last", 1, "--text", text), 2)
    assert "--store keeps what --text gives" in failed(pma("diagnose", run, "--store", short), 2)
    assert "is no store of evaluations" in failed(pma("diagnose", run, "--text", text, "--store", short), 3)
    with monkeypatch.context() as patch:
        patch.setattr(room, "available_bytes", lambda: 2**20)
        assert "in memory takes about" in failed(pma("diagnose", run, "--text", text), 3)
    with monkeypatch.context() as patch:

        def missing(like: Path) -> None:
            raise MissingExtra("evaluation", "eval", "transformers")

        patch.setattr(model, "_architecture", missing)
        assert "pip install 'pma-llm[eval]'" in failed(pma("diagnose", run, "--text", text), 2)
    (run / "checkpoint-30" / "config.json").unlink()
    assert "checkpoint-30 cannot be evaluated: its configuration" in failed(
        pma("diagnose", run, "--text", text), 3
    )


def test_a_run_that_is_no_language_model(tmp_path: Path, text: Path) -> None:
    tiny_run(tmp_path / "run", steps=3)
    assert "cannot be evaluated" in failed(pma("diagnose", tmp_path / "run", "--text", text), 3)


def test_without_a_text_nothing_of_torch_models_is_needed(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=3)
    assert "look" not in json.loads(pma("diagnose", tmp_path / "run", "--json").stdout)
    assert not (tmp_path / "run" / STORE_FILE).exists()
