"""`pma sweep`: table, JSON, store, pictures, written merges, errors."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from pma import verbs
from pma.cli import app
from pma.testing import store_mean, tiny_llama_run, tiny_run
from pma.verbs import Candidate, Choice


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_llama_run(folder / "run", steps=5)
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(30)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(sentences))
    return folder / "run"


def sweep(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def evaluated(run: Path, *arguments: object) -> dict[str, object]:
    done = sweep(run, *arguments, "--text", run.parent / "text.txt", "--cloze", 0, "--json")
    assert done.exit_code == 0, done.stderr
    value: dict[str, object] = json.loads(done.stdout)
    return value


def test_a_repeated_or_wider_sweep_evaluates_only_what_is_new(run: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "results.sqlite")
    first = evaluated(run, "--last", "2,3", "--scheme", "sma,wma", *store)
    assert (first["merges"], first["from_store"], first["evaluation_passes"]) == (4, 0, 1)
    again = evaluated(run, "--last", "2,3", "--scheme", "sma,wma", *store)
    assert again["from_store"] == 5  # four merges and the raw checkpoint
    assert again["rows"] == first["rows"]
    wider = evaluated(run, "--last", "2,3,4", "--scheme", "sma,wma", *store)
    assert (wider["merges"], wider["from_store"]) == (6, 5)
    other_settings = evaluated(run, "--last", "2,3", "--scheme", "sma,wma", "--context", 32, *store)
    assert other_settings["from_store"] == 0


def test_losses_are_those_of_pma_eval(run: Path, tmp_path: Path) -> None:
    value = evaluated(run, "--last", "3", "--scheme", "wma", "--store", tmp_path / "r.sqlite")
    [row] = value["rows"]  # type: ignore[misc]
    choice = Choice(paths=(run,), window=verbs.Window(last=3))
    documents = verbs.held_out_documents([run.parent / "text.txt"], run)
    candidate = Candidate(name="wma", choice=choice, options=verbs.MergeOptions(scheme="wma"))
    [expected] = verbs.evaluate([candidate], documents, cloze=0)
    assert row["loss"] == expected.loss.value
    assert row["steps"] == [30, 40, 50]


def test_a_sweep_of_interval_means_is_another_than_one_of_checkpoints(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copy(run.parent / "text.txt", tmp_path / "text.txt")
    for step in (30, 40, 50):
        weights = load_file(copy / f"checkpoint-{step}" / "model.safetensors")
        store_mean(copy / f"checkpoint-{step}", {name: 0.9 * value for name, value in weights.items()})
    store = ("--store", tmp_path / "results.sqlite")
    snapshots = evaluated(copy, "--last", "3", *store)
    use = ("--use", "interval-means")
    means = evaluated(copy, "--last", "3,5", *use, *store)
    assert "no mean is stored beside 2 of the window's 5" in means["skipped"][0]  # type: ignore[index]
    assert means["from_store"] == 1  # the raw checkpoint, which is no mean
    [one], [other] = snapshots["rows"], means["rows"]  # type: ignore[misc]
    assert one["merge_key"] != other["merge_key"]
    assert one["loss"] != other["loss"]
    text = ("--text", tmp_path / "text.txt", "--cloze", 0)
    shown = CliRunner().invoke(
        app, [str(a) for a in ("eval", copy, "--merge", "--last", 3, *use, *text, "--json")]
    )
    last, merge = json.loads(shown.stdout)["comparison"]
    assert merge["name"] == "sma of interval means"
    assert merge["loss"]["value"] == other["loss"] != last["loss"]["value"]
    assert evaluated(copy, "--last", "3", *use, *store)["rows"] == [other]


def test_the_table_and_the_pictures(run: Path, tmp_path: Path) -> None:
    text = run.parent / "text.txt"
    shown = sweep(
        run,
        "--last",
        "2,3",
        "--every",
        "10,20",
        "--text",
        text,
        "--cloze",
        0,
        "--store",
        tmp_path / "r.sqlite",
    )
    assert shown.exit_code == 0, shown.stderr
    assert "20 steps" in shown.stdout
    assert "confirm it on other text" in shown.stdout
    assert "5 of 5 distinct models are new; 1 pass over" in shown.stderr  # 4 merges, 1 raw
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "sweep.html").read_text()


def test_the_store_lies_in_the_run_and_is_no_checkpoint(run: Path) -> None:
    evaluated(run, "--last", "2")
    assert (run / ".pma" / "results.sqlite").is_file()
    assert len(verbs.inspect(run)["checkpoints"]) == 5
    assert not [left for left in verbs.inspect(run)["left_out"] if ".pma" in left["path"]]


def test_written_merges_and_what_they_took(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=5)
    done = sweep(
        tmp_path / "run", "--last", "2,3", "--scheme", "sma,ema:0.2", "--write", tmp_path / "out", "--json"
    )
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert "rows" not in value
    names = sorted(Path(entry["path"]).name for entry in value["written"])
    assert names == ["ema-0.2-last2-at50", "ema-0.2-last3-at50", "sma-last2-at50", "sma-last3-at50"]
    for name in names:
        assert CliRunner().invoke(app, ["verify", str(tmp_path / "out" / name), "--full"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--last", "two"], 2, "expected whole numbers"),
        (["--last", "2", "--every", "x"], 2, "is not understood"),
        (["--last", "99"], 2, "no window of the sweep exists"),
        (["--last", "2", "--scheme", "best"], 2, "is not known"),
        (["--last", "2"], 3, "--text"),
        (["--last", "2", "--write", "RUN/inside"], 2, "inside the run"),
    ],
)
def test_mistakes_are_one_paragraph(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    tiny_run(tmp_path / "run", steps=5)
    given = [a.replace("RUN", str(tmp_path / "run")) for a in arguments]
    done = sweep(tmp_path / "run", *given)
    assert done.exit_code == status
    assert done.stderr.strip().splitlines()[-1].startswith("pma: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
