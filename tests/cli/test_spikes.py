"""`pma spikes`: what it prints, its exit status, and that its command is one that `pma init` takes."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pma.cli import app
from pma.testing import tiny_run


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_with_losses(folder: Path, losses: list[float], every: int = 50) -> Path:
    """Checkpoints each `every` steps; a loss logged each step."""
    for path in tiny_run(folder, steps=len(losses) // every, every=every, shapes={"w": (2,)}):
        step = int(path.name.split("-")[1])
        history = [
            {"step": s + 1, "loss": losses[s], "grad_norm": 1.0, "learning_rate": 1e-3} for s in range(step)
        ]
        state = {"global_step": step, "num_input_tokens_seen": step * 100, "log_history": history}
        (path / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def losses() -> list[float]:
    random = np.random.default_rng(0)
    values: list[float] = (3 + 0.02 * random.standard_normal(400)).tolist()
    return values


def test_a_healthy_run(tmp_path: Path, losses: list[float]) -> None:
    run = run_with_losses(tmp_path / "run", losses)
    shown = pma("spikes", run)
    assert shown.exit_code == 0
    assert shown.stdout == "Nothing broke away in 400 entries, steps 1 to 400.\n"
    assert f"log: {run}/checkpoint-400/trainer_state.json" in shown.stderr
    value = json.loads(pma("spikes", run, "--json").stdout)
    assert (value["breakaways"], value["entries"], value["last_step"]) == ([], 400, 400)


def test_a_collapse_the_checkpoints_before_it_and_the_way_past(tmp_path: Path, losses: list[float]) -> None:
    losses[320:] = [value + 2 for value in losses[320:]]
    run = run_with_losses(tmp_path / "my run", losses)
    shown = pma("spikes", run)
    assert shown.exit_code == 1
    assert "loss, step 321: a rise that did not come back" in shown.stdout
    assert "checkpoints before: checkpoint-200, checkpoint-250, checkpoint-300" in shown.stdout
    out = f"{run}-before-320"
    expected = ["pma", "init", str(run), "-o", out, "--before-step", "320", "--last", "3"]
    assert shlex.join(expected) in shown.stdout
    asked = pma("spikes", run, "--json")
    assert asked.exit_code == 1
    (found,) = json.loads(asked.stdout)["breakaways"]
    assert (found["kind"], found["first_step"], found["last_step"]) == ("collapse", 321, 400)
    assert [Path(path).name for path in found["checkpoints"]] == [f"checkpoint-{s}" for s in (200, 250, 300)]
    assert shlex.split(found["command"]) == expected
    assert found["size_mads"] > 50


def test_not_a_number_is_valid_json(tmp_path: Path, losses: list[float]) -> None:
    losses[390:] = [float("nan")] * 10
    asked = pma("spikes", run_with_losses(tmp_path / "run", losses), "--json")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    (found,) = json.loads(asked.stdout, parse_constant=refuse)["breakaways"]
    assert (found["kind"], found["peak"], found["size_mads"]) == ("not a number", None, None)
    assert [Path(path).name for path in found["checkpoints"]] == [f"checkpoint-{s}" for s in (250, 300, 350)]


def test_too_few_checkpoints_are_said(tmp_path: Path, losses: list[float]) -> None:
    losses[120:] = [value + 2 for value in losses[120:]]
    run = run_with_losses(tmp_path / "run", losses)
    shown = pma("spikes", run)
    assert "but there are only 2 complete checkpoints before step 120, not 3" in shown.stdout
    assert "--before-step 120 --last 2" in shown.stdout
    losses[30:] = [value + 2 for value in losses[30:]]
    losses[10] = float("nan")
    first = json.loads(pma("spikes", run_with_losses(tmp_path / "b", losses), "--json").stdout)
    assert first["breakaways"][0]["command"] is None
    assert first["breakaways"][0]["reserve"] == "there is no complete checkpoint before step 10"


def test_a_log_finds_the_run_above_it_and_a_run_takes_a_log_from_elsewhere(
    tmp_path: Path, losses: list[float]
) -> None:
    run = run_with_losses(tmp_path / "run", losses)
    losses[320:] = [value + 2 for value in losses[320:]]
    rows = [{"t": s, "objective": value} for s, value in enumerate(losses)]
    elsewhere = tmp_path / "else" / "far" / "away" / "train.jsonl"
    for log in (run / "logs" / "train.jsonl", elsewhere):
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("--step-name", "t", "--loss-name", "objective")
    inside = json.loads(pma("spikes", run / "logs" / "train.jsonl", *names, "--json").stdout)
    assert inside["run"] == str(run)
    given = json.loads(pma("spikes", run, "--log", elsewhere, *names, "--json").stdout)
    assert given["breakaways"] == inside["breakaways"]
    alone = pma("spikes", elsewhere, *names)
    assert alone.exit_code == 1
    assert "no run with checkpoints was found beside the log" in alone.stdout


def test_a_folder_of_logs_alone(tmp_path: Path, losses: list[float]) -> None:
    losses[320:] = [value + 2 for value in losses[320:]]
    rows = "".join(json.dumps({"step": s, "loss": value}) + "\n" for s, value in enumerate(losses))
    (tmp_path / "log.jsonl").write_text(rows)
    shown = pma("spikes", tmp_path)
    assert shown.exit_code == 1
    assert "no run with checkpoints was found" in shown.stdout
    assert "holds no checkpoint" in shown.stderr
    assert json.loads(pma("spikes", tmp_path, "--json").stdout)["run"] is None


def test_bad_input_is_one_paragraph(tmp_path: Path, losses: list[float]) -> None:
    run = run_with_losses(tmp_path / "run", losses)
    for status, *arguments in (
        (3, tmp_path / "nothing"),
        (2, run / "checkpoint-50"),
        (3, run, "--log", run / "missing.csv"),
        (2, run, "--loss-name", "objective"),
    ):
        result = pma("spikes", *arguments)
        assert result.exit_code == status, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("pma: ")
        assert "Traceback" not in result.stderr
