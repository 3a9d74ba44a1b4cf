"""`pma eval --tasks` and `pma sweep --tasks`: tables, JSON, the store, weights, mistakes."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pma import verbs
from pma.cli import app, sweeping
from pma.evaluation.tasks import TaskResult, prepared, scores
from pma.results import Store
from pma.testing import tiny_llama_run
from pma.verbs import Candidate, Choice, MergeOptions, Window

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tiny_llama_run(folder / "run", steps=4)
    evals = folder / "evals"
    evals.mkdir()
    pairs = [{"good": f"{chr(97 + i)} sleeps", "bad": f"{chr(97 + i)} sleep "} for i in range(12)]
    words = [{"context": f"{i} and {i}", "choices": ["one", "three", "or"], "gold": i % 3} for i in range(10)]
    for name, rows in (("pairs", pairs), ("words", words), ("generation", [{"prompt": "x"}])):
        (evals / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(30)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(sentences))
    return folder / "run"


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds, and are tested once."""
    monkeypatch.setattr(sweeping, "_draw", lambda rows, path: [])


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def value_of(*arguments: object) -> dict[str, Any]:
    done = pma(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_eval_of_checkpoints(run: Path) -> None:
    evals = run.parent / "evals"
    arguments = ("eval", run / "checkpoint-10", run / "checkpoint-20", "--tasks", evals)
    shown = pma(*arguments)
    assert shown.exit_code == 0, shown.stderr
    for expected in ("pairs", "words", "acc_norm", "weighted mean", "better by"):
        assert expected in shown.stdout
    assert "loss" not in shown.stdout
    assert "generation.jsonl: its fields are those of no task" in shown.stderr
    assert "on 2 tasks" in shown.stderr
    value = value_of(*arguments)
    assert "comparison" not in value
    assert len(value["task_comparison"]) == 6
    first, second = ([TaskResult.from_json(t) for t in m["tasks"]] for m in value["task_results"])
    row = next(r for r in value["task_comparison"] if (r["task"], r["improvement"]) == ("words", None))
    assert row["score"]["value"] == scores.score(first[1]).value
    [better] = [r["improvement"] for r in value["task_comparison"][3:4]]
    assert better["value"] == scores.score_difference(second[1], first[1]).value
    harness = value["task_results"][0]["tasks"][1]["harness"]
    assert harness["results"]["words"]["acc_norm,none"] == pytest.approx(row["score"]["value"])


def test_eval_of_an_unwritten_merge_is_that_of_the_written_one(run: Path, tmp_path: Path) -> None:
    verbs.merge(Choice(paths=(run,), window=Window(last=3)), tmp_path / "merged")
    words = run.parent / "evals" / "words.jsonl"
    unwritten = value_of("eval", run, "--merge", "--last", 3, "--tasks", words)["task_results"]
    written = value_of("eval", tmp_path / "merged", "--tasks", words)["task_results"]
    assert [model["name"] for model in unwritten] == ["last (checkpoint-40)", "sma"]
    assert unwritten[1]["tasks"][0]["parts"] == written[0]["tasks"][0]["parts"]
    assert unwritten[0]["tasks"][0]["parts"] != written[0]["tasks"][0]["parts"]


def test_eval_of_text_and_tasks_with_weights_and_a_limit(run: Path) -> None:
    evals, text = run.parent / "evals", run.parent / "text.txt"
    both = f"{evals / 'pairs.jsonl'},{evals / 'words.jsonl'}"
    arguments = ("--text", text, "--cloze", 0, "--tasks", both, "--limit", 6, "--weights", "words=3,pairs=1")
    value = value_of("eval", run / "checkpoint-10", *arguments)
    assert len(value["comparison"]) == 1
    pairs, words, mean = value["task_comparison"]
    assert len(value["task_results"][0]["tasks"][0]["parts"][0]["loglikelihoods"]) == 6
    expected = (pairs["score"]["value"] + 3 * words["score"]["value"]) / 4
    assert mean["score"]["value"] == pytest.approx(expected)


@pytest.mark.usefixtures("no_charts")
def test_sweep_keeps_each_task_and_computes_only_what_is_new(run: Path, tmp_path: Path) -> None:
    evals = run.parent / "evals"
    common = ("sweep", run, "--scheme", "sma,wma", "--store", tmp_path / "r.sqlite")
    words = ("--tasks", evals / "words.jsonl")
    first = value_of(*common, "--last", "2,3", *words)
    assert (first["merges"], first["from_store"]) == (4, 0)
    again = value_of(*common, "--last", "2,3", *words)
    assert (again["rows"], again["from_store"]) == (first["rows"], 5)  # the merges and the raw checkpoint
    assert value_of(*common, "--last", "2,3,4", *words)["from_store"] == 5
    # another task beside the first, the same one under another name of its folder, other settings
    assert value_of(*common, "--last", "2,3", "--tasks", evals)["from_store"] == 5
    assert value_of(*common, "--last", "2,3", *words, "--limit", 5)["from_store"] == 0
    assert value_of(*common, "--last", "2,3", *words, "--context", 32)["from_store"] == 0
    changed = tmp_path / "words.jsonl"
    changed.write_text((evals / "words.jsonl").read_text().replace("three", "seven"))
    assert value_of(*common, "--last", "2,3", "--tasks", changed)["from_store"] == 0
    with Store(tmp_path / "r.sqlite") as store:
        assert len(store.rows()) == 5 + 2 + 5 + 3 * 5


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("change", [{"parts": 1}, {"metric": "f1"}, {"parts": [{"name": "words"}]}])
def test_a_result_in_the_store_that_is_none(run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "r.sqlite"
    arguments = ("sweep", run, "--last", 2, "--tasks", run.parent / "evals" / "words.jsonl", "--store", path)
    value_of(*arguments)
    with sqlite3.connect(path) as connection:
        [(text,)] = connection.execute("SELECT result FROM evaluations LIMIT 1").fetchall()
        connection.execute("UPDATE evaluations SET result = ?", (json.dumps(json.loads(text) | change),))
    connection.close()
    done = pma(*arguments)
    assert done.exit_code == 3
    assert "cannot be read" in done.stderr


@pytest.mark.usefixtures("no_charts")
def test_scores_of_a_sweep_are_those_of_eval(run: Path, tmp_path: Path) -> None:
    evals = run.parent / "evals"
    arguments = ("--tasks", evals, "--weights", "pairs=1,words=2", "--store", tmp_path / "r.sqlite")
    [row] = value_of("sweep", run, "--last", "3", "--scheme", "wma", *arguments)["rows"]
    candidates = [
        Candidate(name="last", choice=Choice(paths=(run / "checkpoint-40",))),
        Candidate(
            name="wma",
            choice=Choice(paths=(run,), window=Window(last=3)),
            options=MergeOptions(scheme="wma"),
        ),
    ]
    with prepared([str(evals)]) as (tasks, _):
        _, [last, merged] = verbs.evaluate_with_tasks(candidates, [], tasks)
    assert row["tasks"]["words"]["score"] == scores.score(merged[1]).value
    assert row["tasks"]["words"]["gain"] == scores.score_difference(merged[1], last[1]).value
    mean = scores.mean_score(merged, [1, 2])
    assert (row["mean_score"], row["mean_score_standard_error"]) == (mean.value, mean.standard_error)
    gain = scores.mean_difference(list(zip(merged, last, strict=True)), [1, 2])
    assert row["mean_score_gain"] == gain.value
    assert "loss" not in row


def test_sweep_of_text_and_tasks(run: Path, tmp_path: Path) -> None:
    store, text = tmp_path / "r.sqlite", run.parent / "text.txt"
    arguments = ("sweep", run, "--last", "2,3", "--text", text, "--cloze", 0, "--store", store)
    assert value_of(*arguments)["from_store"] == 0
    shown = pma(*arguments, "--tasks", run.parent / "evals")
    assert shown.exit_code == 0, shown.stderr
    for expected in ("loss (nats a token)", "pairs", "words", "weighted mean", "3 evaluations were known"):
        assert expected in shown.stdout
    for name in ("sweep", "sweep-tasks"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "weighted mean of the tasks" in (tmp_path / "sweep-tasks.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--tasks", "EVALS/nowhere.jsonl"], 3, "does not exist"),
        (["--tasks", "EVALS/generation.jsonl"], 3, "no task that is known"),
        (["--tasks", "EVALS", "--weights", "pairs=1"], 2, "leaves out words"),
        (["--weights", "pairs=1"], 2, "of which there are none"),
    ],
)
@pytest.mark.parametrize("command", [["eval"], ["sweep", "--last", "2"]])
def test_mistakes_are_one_paragraph(
    run: Path, command: list[str], arguments: list[str], status: int, words: str
) -> None:
    given = [a.replace("EVALS", str(run.parent / "evals")) for a in arguments]
    done = pma(*command, run, *given)
    assert done.exit_code == status
    assert done.stderr.strip().splitlines()[-1].startswith("pma: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
