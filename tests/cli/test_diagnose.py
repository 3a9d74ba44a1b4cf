"""`pma diagnose`: what it prints, its JSON, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pma.cli import app
from pma.testing import tiny_run
from pma.testing.builders import write_trainer_state


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_run(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=10)
    shown = pma("diagnose", tmp_path / "run")
    assert shown.exit_code == 0, shown.stderr
    assert "10 checkpoints, steps 10 to 100; phase stable" in shown.stdout
    for name in ("embedding", "other", "all"):
        assert f"\n{name}" in shown.stdout
    value = json.loads(pma("diagnose", tmp_path / "run", "--last", 6, "--json").stdout)
    assert [c["step"] for c in value["checkpoints"]] == [50, 60, 70, 80, 90, 100]
    whole = value["whole"]
    # weights drawn anew each time: no drift, no memory, neighbouring updates at -1/2
    assert whole["drift_share"] < 0.05
    assert whole["autocorrelation"] < 0.1
    assert whole["effective_checkpoints"] == pytest.approx(6, rel=0.1)
    assert whole["neighbour_cosine"] == pytest.approx(-0.5, abs=0.05)
    assert sum(group["elements"] for group in value["groups"].values()) == whole["elements"] == 1297


def test_at_ends_the_default_window(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=30)
    value = json.loads(pma("diagnose", tmp_path / "run", "--at", 250, "--json").stdout)
    assert [c["step"] for c in value["checkpoints"]] == list(range(60, 251, 10))


def test_a_window_across_phases_is_told_not_refused(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=8)
    rates = {step: 1e-3 if step <= 50 else 1e-3 * (90 - step) / 40 for step in range(10, 90, 10)}
    for number, path in enumerate(paths, 1):
        write_trainer_state(path, number * 10, rates=rates)
    shown = pma("diagnose", tmp_path / "run")
    assert shown.exit_code == 0
    assert "changes between step 50 (stable at lr 0.001) and step 60 (decay" in shown.stdout


def test_checkpoints_one_by_one_without_steps(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=3)
    for path in paths:
        (path / "trainer_state.json").unlink()
    renamed = [path.rename(path.with_name(name)) for path, name in zip(paths, "abc", strict=True)]
    shown = pma("diagnose", *renamed, "--as-given")
    assert shown.exit_code == 0, shown.stderr
    assert "in the order given" in shown.stdout
    assert "steps are not known" in shown.stderr


@pytest.mark.parametrize(
    ("steps", "flags", "message", "status"),
    [
        (1, [], "a single checkpoint", 3),
        (5, ["--last", 1], "a single checkpoint", 3),
        (5, ["--last", 9], "there are only 5", 2),
        (5, ["--log", "nowhere.csv"], "does not exist", 3),
        (5, ["--memory", "1KiB"], "too little", 2),
    ],
)
def test_bad_requests(tmp_path: Path, steps: int, flags: list[object], message: str, status: int) -> None:
    tiny_run(tmp_path / "run", steps=steps)
    done = pma("diagnose", tmp_path / "run", *flags)
    assert (done.exit_code, "Traceback" in done.stderr) == (status, False)
    assert message in done.stderr


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=3, shapes={"a": (4, 4)})
    tiny_run(tmp_path / "other", steps=4, shapes={"a": (4, 5)})
    done = pma("diagnose", *(tmp_path / "run").glob("checkpoint-*"), tmp_path / "other" / "checkpoint-40")
    assert done.exit_code == 3
    assert "shape (4, 4), expected (4, 5)" in done.stderr
