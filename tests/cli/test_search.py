"""`pma sweep --search`: what it prints, its JSON, the command that makes the winner, mistakes."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pma import sweeping, trajectory
from pma.cli import app
from pma.cli.searching import merge_command, parsed_budget
from pma.engine import MergeOptions
from pma.errors import UsageError
from pma.evaluation.text import read_documents, write_documents
from pma.quantities import Steps, Tokens
from pma.sweeping import Space
from pma.sweeping.candidates import merges_of_best
from pma.sweeping.halves import halved
from pma.testing import tiny_llama_run, tiny_run
from pma.types import DType

SPACE = ("--last", "2,3", "--best", "2,3", "--scheme", "sma,wma")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    tiny_llama_run(folder / "run", steps=7)
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(24)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(sentences))
    return folder / "run"


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def search(run: Path, *arguments: object) -> Result:
    return pma("sweep", run, "--search", *arguments, "--text", run.parent / "text.txt")


def test_the_printed_command_makes_the_model_that_was_reported(run: Path, tmp_path: Path) -> None:
    done = search(run, *SPACE, "--json", "--store", tmp_path / "r.sqlite")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    found = value["search"]
    assert found["documents"] == {"selection": 12, "report": 12}
    assert found["evaluations"] <= found["budget"]
    words = shlex.split(value["command"])
    assert words[:2] == ["pma", "merge"]
    assert pma(*words[1:-1], tmp_path / "merged").exit_code == 0
    report = tmp_path / "report.txt"
    write_documents(report, halved(read_documents([run.parent / "text.txt"])).report)
    shown = pma("eval", tmp_path / "merged", "--text", report, "--cloze", 0, "--json")
    [evaluated] = json.loads(shown.stdout)["comparison"]
    for name in ("value", "standard_error"):
        assert evaluated["loss"][name] == pytest.approx(found["winner"]["report"]["loss"][name], rel=1e-6)


def test_what_people_see_and_a_second_time_nothing_is_read(run: Path, tmp_path: Path) -> None:
    first = search(run, *SPACE, "--budget", "9", "--store", tmp_path / "r.sqlite")
    assert first.exit_code == 0, first.stderr
    for words in (
        "of 9 readings of the text",
        "on the half to choose by (12 documents",
        "plain window",
        "than the",
    ):
        assert words in first.stdout
    assert "by which nothing was chosen" in first.stdout
    assert "models are new; 1 pass over the checkpoints" in first.stderr
    again = search(run, *SPACE, "--budget", "9", "--store", tmp_path / "r.sqlite")
    assert "were known before" in again.stdout
    assert "are new" not in again.stderr


def test_every_candidate_has_a_command_that_makes_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(run, steps=12)
    space = Space(lasts=(2, 3), everys=(None, Steps(20)), ats=(100, 120), schemes=("wma", "sma"), best=(2,))
    options = MergeOptions(dtype=DType.F32, exclude=("*.bias",), copy=("scale",))
    with sweeping.planner(options) as plans:
        field = sweeping.field(trajectory.resolve([run]), space, plans)
        losses = {point.path: float(number % 3) for number, point in enumerate(field.pool)}
        best = merges_of_best(field, losses, plans)
        assert merge_command(field.last, [run], space, options) is None
        for contender in (field.plain, *field.windows, *best):
            words = shlex.split(merge_command(contender, [run], space, options) or "")
            planned = json.loads(pma("plan", *words[2:-2], "--json").stdout)
            plan = plans.plans[contender.plan]
            expected = [(source.point.step, source.weight) for source in plan.sources]
            assert [(source["step"], source["weight"]) for source in planned["sources"]] == expected
            assert planned["excluded"] == ["layer.0.bias"]
            assert planned["copied"] == ["scale"]
            assert "F32" in planned["output_dtypes"]


def test_budgets() -> None:
    assert parsed_budget(None) is None
    assert parsed_budget("20") == 20.0
    assert parsed_budget("7.5") == 7.5
    assert parsed_budget("2M") == parsed_budget("2Mtokens") == Tokens(2_000_000)
    for wrong in ("0", "0M", "-3", "many", "1e9", "nan"):
        with pytest.raises(UsageError):
            parsed_budget(wrong)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--search", "--tasks", "words.jsonl"], 2, "--search chooses by the loss of a text"),
        (["--search", "--write", "OUT"], 2, "ends with the pma merge command"),
        (["--search", "--budget", "2"], 2, "are too few for"),
        (["--search", "--budget", "much"], 2, "is not understood"),
        (["--search", "--best", "1"], 2, "a merge has at least two"),
        (["--search", "--best", "x"], 2, "expected whole numbers"),
        (["--search", "--last", "99"], 2, "no window of the search exists"),
        (["--search", "--text", "SHORT"], 3, "needs at least 8"),
        (["--last", "2", "--budget", "9"], 2, "go with --search"),
        ([], 2, "which windows? Say --last"),
    ],
)
def test_mistakes_are_one_paragraph(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    tiny_run(tmp_path / "run", steps=5)
    documents = [f"document {number}" for number in range(20)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    (tmp_path / "short.txt").write_text("\n<|endoftext|>\n".join(documents[:7]))
    places = {"OUT": str(tmp_path / "out"), "SHORT": str(tmp_path / "short.txt")}
    given = [places.get(argument, argument) for argument in arguments]
    text = () if "--text" in arguments else ("--text", tmp_path / "text.txt")
    done = pma("sweep", tmp_path / "run", *given, *text)
    assert done.exit_code == status
    assert done.stderr.strip().splitlines()[-1].startswith("pma: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
