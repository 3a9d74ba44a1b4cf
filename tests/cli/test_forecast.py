"""`pma forecast`: what it prints, its JSON, how files go together, and one paragraph for bad input."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pma import forecast as pma_forecast
from pma.cli import app

PEAK = 3e-4


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error_of(result: Result) -> str:
    assert result.exit_code in (2, 3), result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("pma: ")
    assert "Traceback" not in result.stderr
    return last


def write(path: Path, rows: dict[str, np.ndarray]) -> Path:
    lines = [
        ",".join(rows),
        *(",".join(f"{v!r}" for v in row) for row in zip(*(c.tolist() for c in rows.values()), strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def losses(steps: np.ndarray, drop_at: int) -> np.ndarray:
    """A power law that falls a little further after a drop of the rate; smooth, but for a seeded noise."""
    after = np.maximum(steps - drop_at, 0)
    noise = 3e-4 * np.random.default_rng(drop_at).standard_normal(len(steps))
    return 3 + 8 * steps**-0.5 - 0.08 * (1 - 1 / (1 + after / 100)) + noise


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals need not be good here, only there."""
    monkeypatch.setattr(pma_forecast, "learn", functools.partial(pma_forecast.learn, draws=8))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    steps = np.arange(100, 6001, 100)
    flat, drop = np.full(60, PEAK), np.where(steps < 4000, PEAK, 0.2 * PEAK)
    plan = np.array([100, 6000, 8000])
    return {
        "flat": write(tmp_path / "flat.csv", {"step": steps, "lr": flat, "loss": losses(steps, 10**6)}),
        "drop": write(tmp_path / "drop.csv", {"step": steps, "lr": drop, "loss": losses(steps, 4000)}),
        "loss": write(tmp_path / "loss.csv", {"step": steps, "loss": losses(steps, 4000)}),
        "rates": write(tmp_path / "rates.csv", {"step": steps, "lr": drop}),
        "plan": write(tmp_path / "plan.csv", {"step": plan, "lr": np.array([PEAK, PEAK, 0.2 * PEAK])}),
    }


def test_an_anneal_with_lengths_chart_and_json(files: dict[str, Path], tmp_path: Path) -> None:
    asked = ["--curve", files["flat"], "--curve", files["drop"], "--anneal", "cosine", "--steps", 1000]
    shown = pma("forecast", *asked, "--from", 5000, "--floor", 0.2, "-o", tmp_path / "chart.png")
    assert shown.exit_code == 0, shown.output
    assert "cosine over 1000 steps from step 5000\nexpected loss at step 6000: 3.0" in shown.stdout
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    value = json.loads(pma("forecast", *asked, "--from", 5000, "--floor", 0.2, "--json").stdout)
    assert f"expected loss at step 6000: {value['loss']:.4f}" in shown.stdout
    assert value["step"] == 6000
    low, high = value["interval95"]
    assert low < value["interval80"][0] < value["loss"] < value["interval80"][1] < high
    assert value["gain"] == pytest.approx(value["constant_loss"] - value["loss"])
    assert [each["steps"] for each in value["lengths"]] == [250, 500, 1000, 2000, 4000]
    assert value["lengths"][2]["loss"] == pytest.approx(value["loss"])
    assert value["lengths"][0]["loss"] > value["lengths"][4]["loss"]
    assert value["rows"][-1]["loss"] == pytest.approx(value["loss"])
    assert value["told"]
    assert value["law"] == "multi-power"


def test_files_go_together(files: dict[str, Path], tmp_path: Path) -> None:
    """A curve without rates takes them from its schedule; a schedule left over is what is forecast."""

    def forecast(*arguments: object) -> dict[str, object]:
        asked = pma("forecast", *arguments, "--json")
        assert asked.exit_code == 0, asked.output
        found: dict[str, object] = json.loads(asked.stdout)
        return found

    given = forecast("--curve", files["drop"], "--target", files["plan"])
    assert given["step"] == 8000
    assert (
        forecast("--curve", files["loss"], "--schedule", files["rates"], "--target", files["plan"])["loss"]
        == given["loss"]
    )
    assert forecast("--curve", files["drop"], "--schedule", files["plan"])["loss"] == given["loss"]
    own = forecast("--curve", files["drop"], "--target", files["flat"])
    assert own["against_known"] is not None
    # one schedule that goes beyond its curve is both
    rates = files["rates"].read_text() + f"9000,{0.1 * PEAK!r}\n"
    (tmp_path / "longer.csv").write_text(rates)
    both = forecast("--curve", files["loss"], "--schedule", tmp_path / "longer.csv")
    assert both["step"] == 9000
    page = pma("forecast", "--curve", files["drop"], "--target", files["plan"], "-o", tmp_path / "a.html")
    assert page.exit_code == 0
    assert "<script" in (tmp_path / "a.html").read_text()


def test_tokens_are_steps_by_the_batch(files: dict[str, Path]) -> None:
    asked = ["--curve", files["drop"], "--anneal", "linear", "--tokens", "4M", "--batch", "4K", "--json"]
    assert json.loads(pma("forecast", *asked).stdout)["step"] == 7000


def test_of_a_run_it_works_in_one_process(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    decay = ("--anneal", "cosine", "--steps", 200)
    refused = error_of(pma("forecast", tmp_path / "run", *decay, "--probe"))
    assert "pma forecast RUN works in one process, and this one was started as rank 1 of 2" in refused
    assert pma("forecast", "--curve", files["drop"], *decay).exit_code == 0


def test_constant_curves_alone_say_what_is_needed(files: dict[str, Path]) -> None:
    said = error_of(pma("forecast", "--curve", files["flat"], "--anneal", "cosine", "--steps", 500))
    assert "never falls" in said
    assert "Add the curve of a run that was annealed" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("1,2\n3,4\n", "expected the names of columns"),
        ("step,lr,loss\n", "has no rows"),
        ("step,loss\n1,2\n", "1 of them without learning rates"),
        ("step,lr,loss\n1,1,1,1\n", "row 1 has 4 cells; expected 3"),
        ("step,lr,loss\n1,1,x\n", "row 1 has 'x'; expected a number"),
        ("step,lr,loss\n2,1,1\n1,1,1\n", "steps do not rise: row 2 has step 1 after 2"),
        ("step,lr,loss\n,1,1\n", "row 1 has step nan"),
        ("step,lr,loss\n" + "".join(f"{i},1e-3,nan\n" for i in range(1, 40)), "loss at step 1 is nan"),
        ("step,lr,loss\n" + "".join(f"{i},1e-3,3\n" for i in range(1, 10)), "has 9 losses"),
        ("step,lr,loss\n1,nan,3\n", "learning rate at step 1 is nan"),
        ("step,loss,train_loss,lr\n1,1,1,1\n", "two columns of loss"),
    ],
)
def test_bad_files_are_one_paragraph(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    assert said in error_of(
        pma("forecast", "--curve", tmp_path / "bad.csv", "--anneal", "linear", "--steps", 9)
    )


def test_bad_requests(files: dict[str, Path], tmp_path: Path) -> None:
    drop = ["--curve", files["drop"]]
    for said, arguments in (
        ("what is to be forecast", drop),
        ("does not exist", ["--curve", tmp_path / "no.csv", "--anneal", "linear", "--steps", 9]),
        ("--law 'x' is not known", [*drop, "--law", "x"]),
        ("there is no decay 'square'", [*drop, "--anneal", "square", "--steps", 9]),
        ("how long is the decay", [*drop, "--anneal", "linear"]),
        ("--tokens needs --batch", [*drop, "--anneal", "linear", "--tokens", "1M"]),
        ("give its shape with --anneal", [*drop, "--steps", 9]),
        ("expected one of them", [*drop, "--anneal", "linear", "--steps", 9, "-o", "a.pdf"]),
        ("give one of them", [*drop, "--anneal", "linear", "--steps", 9, "--target", files["plan"]]),
        (
            "2 schedules",
            [*drop, "--schedule", files["rates"], "--schedule", files["rates"], "--target", files["plan"]],
        ),
    ):
        assert said in error_of(pma("forecast", *arguments)), said
