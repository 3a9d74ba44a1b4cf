"""Forecasts of a run on disk whose models are quadratic: its decays are carried out and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from pma import annealing
from pma.annealing import Bench
from pma.cli import app
from pma.errors import InputError
from pma.evaluation.evaluate import Evaluation
from pma.evaluation.measures import TEXT, Measure
from pma.forecast.calibration import Calibration, Decay
from pma.pretraining import load_recipe, run_folder
from pma.pretraining.run_folder import RunRecord
from pma.results import Store
from pma.testing.builders import write_trainer_state
from pma.trajectory import resolve

RATE, STEPS, EVERY, COORDINATES = 0.3, 1_200, 20, 4_000
CURVATURE = np.logspace(0, -3, COORDINATES)
PLAIN = Calibration(
    name="none",
    what="",
    alpha=0.5,
    offset=0.0,
    slope=0.0,
    of_run=0.02,
    of_fork=0.02,
    of_decay=0.02,
    freedom=8,
    probe_error=0.02,
    moved=(0.01, 0.5),
    runs=1,
    cases=1,
)


def loss_of(weights: np.ndarray) -> float:
    return float(2.0 + 0.5 * (CURVATURE * weights**2).sum())


def trained(
    folder: Path, start: np.ndarray, first: int, shares: np.ndarray, *, every: int = EVERY, seed: int = 0
) -> np.ndarray:
    """SGD with noisy gradients; a checkpoint each `every` steps, rates in its log."""
    random, weights = np.random.default_rng(seed), start.copy()
    noise = np.sqrt(0.02 * CURVATURE**0.7 / COORDINATES * 600)
    rates = dict.fromkeys(range(1, first + 1), RATE)
    for i, share in enumerate(shares):
        step = first + i + 1
        rates[step] = RATE * share
        gradient = CURVATURE * weights + noise * random.standard_normal(COORDINATES)
        weights = weights - RATE * share * gradient
        if step % every == 0:
            path = folder / f"checkpoint-{step}"
            path.mkdir(parents=True)
            save_file({"w": weights.astype(np.float32)}, path / "model.safetensors")
            (path / "config.json").write_text('{"model_type": "tiny"}')
            write_trainer_state(path, step, every=1, rates=rates)
    return weights


def measured(name: str, scorer: Mapping[str, Any]) -> Evaluation:
    """Ten documents, whose losses differ."""
    loss = loss_of(scorer["w"].double().numpy())
    return Evaluation(
        name=name,
        text_digest="x",
        context_tokens=8,
        text_bytes=1_000,
        nats=tuple(100 * loss + 3 * i for i in range(-5, 6)),
        tokens=(100,) * 11,
    )


def bench(store: Store, seen: list[str] | None = None) -> Bench:
    return Bench(
        measure=Measure(name=TEXT, key="quadratic", run=measured, read=Evaluation.from_json),
        store=store,
        load=lambda tensors, path, **_: tensors,
        announce=(seen if seen is not None else []).append,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quadratic") / "run"
    start = np.sqrt(0.02 / CURVATURE**0.65) / 10
    trained(folder, start, 0, np.ones(STEPS))
    return folder


def weights_at(run: Path, step: int) -> np.ndarray:
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")["w"].astype(np.float64)


def test_a_forecast_is_what_decays_give(run: Path, tmp_path: Path) -> None:
    """And is made from the store the second time."""
    points, notes = annealing.constant_points(resolve([run]))
    assert (len(points), notes) == (STEPS // EVERY, [])
    assert annealing.tokens_a_step(resolve([run])) == 100
    decay = Decay(shape="cosine", steps=200)
    seen: list[str] = []
    with Store(tmp_path / "results.sqlite") as store:
        made = annealing.forecast_run(points, STEPS, decay, PLAIN, bench(store, seen), lengths=(0.5, 2.0))
        assert seen[-1] == f"evaluating {len(made.probes)} of {len(made.probes)}"
        again: list[str] = []
        assert annealing.forecast_run(points, STEPS, decay, PLAIN, bench(store, again)).asked == made.asked
        assert not again
    start = weights_at(run, STEPS)
    for each in (made.asked, *made.lengths):
        shares = Decay(shape="cosine", steps=each.steps).shares
        ends = [loss_of(trained(tmp_path, start, STEPS, shares, every=10**6, seed=s)) for s in range(1, 9)]
        gain = loss_of(start) - np.mean(ends)
        assert gain > 0.05
        assert each.loss == pytest.approx(np.mean(ends), abs=0.12 * gain)


def test_a_decay_of_the_run_is_read_from_its_log(run: Path, tmp_path: Path) -> None:
    decayed, shares = tmp_path / "decayed", Decay(shape="linear", steps=60).shares
    end = trained(decayed, weights_at(run, 800), 800, shares, seed=9)
    points, _ = annealing.constant_points(resolve([run]))
    with Store(tmp_path / "results.sqlite") as store:
        case = annealing.known_decay(decayed, points, bench(store))
        decay = Decay(shape="cosine", steps=200)
        alone = annealing.forecast_run(points, STEPS, decay, PLAIN, bench(store))
        known = annealing.forecast_run(points, STEPS, decay, PLAIN, bench(store), known_paths=[decayed])
    assert case.from_step == 800
    np.testing.assert_allclose(case.shares_T, shares, atol=1e-9)
    assert case.loss == pytest.approx(loss_of(end), abs=1e-5)
    assert known.asked.known == 1
    assert known.asked.error < alone.asked.error


def test_what_is_no_decay_of_the_run(run: Path, tmp_path: Path) -> None:
    points, _ = annealing.constant_points(resolve([run]))
    with Store(tmp_path / "results.sqlite") as store:
        with pytest.raises(
            InputError, match="the learning rate at step 1200 has not fallen; expected a decay"
        ):
            annealing.known_decay(run, points, bench(store))
        elsewhere = tmp_path / "elsewhere"
        trained(elsewhere, weights_at(run, 800), 1_300, Decay(shape="linear", steps=40).shares)
        with pytest.raises(InputError, match=r"decays from step 1300, but .* next to it is of step 1200"):
            annealing.known_decay(elsewhere, points, bench(store))


def test_a_run_that_decays_all_along_is_refused(run: Path, tmp_path: Path) -> None:
    cosine = tmp_path / "cosine"
    trained(cosine, weights_at(run, 200), 0, Decay(shape="cosine", steps=100).shares)
    with pytest.raises(InputError, match="no checkpoint was made at a constant learning rate"):
        annealing.constant_points(resolve([cosine]))


def test_a_run_that_decays_already_is_forecast_from_where_it_began(run: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for step in range(1_000, 1_201, 20):
        (mixed / f"checkpoint-{step}").symlink_to(run / f"checkpoint-{step}")
    trained(mixed, weights_at(run, 1_200), 1_200, Decay(shape="linear", steps=60).shares)
    points, notes = annealing.constant_points(resolve([mixed]))
    assert points[-1].step == 1_200
    assert notes == ["the run decays already, to step 1260; forecasts start from step 1200"]


def test_a_probe_is_a_twentieth_of_the_way() -> None:
    assert annealing.probe_steps(2_500, Decay(shape="linear", steps=500)) == 150
    assert annealing.probe_steps(1, Decay(shape="linear", steps=1)) == 1


@pytest.fixture
def quadratic_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A text whose losses are those of the quadratic."""
    monkeypatch.setattr("pma.evaluation.measures.text_measure", lambda *_, **__: bench(None).measure)  # type: ignore[arg-type]
    monkeypatch.setattr("pma.evaluation.making.default_load", lambda: lambda tensors, path, **_: tensors)
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(f"a document, {i}" for i in range(12)))
    return path


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_the_command(run: Path, quadratic_text: Path, tmp_path: Path) -> None:
    store, chart = ("--store", tmp_path / "results.sqlite"), tmp_path / "chart.html"
    asked = ("forecast", run, "--anneal", "cosine", "--text", quadratic_text, *store)
    shown = pma(*asked, "--tokens", "20k", "-o", chart)
    assert shown.exit_code == 0, shown.stderr
    for words in ("cosine decay of 200 steps from step 1200", "expected held-out loss at step 1400", "80%:"):
        assert words in shown.stdout
    assert "calibration nano: " in shown.stderr
    assert "models are not evaluated yet; reading" in shown.stderr
    found = json.loads(pma(*asked, "--steps", 200, "--json").stdout)
    assert "</html>" in chart.read_text()
    assert found["told"]
    assert found["interval95"][0] < found["interval80"][0] < found["loss"] < found["interval80"][1]
    assert [each["steps"] for each in found["lengths"]] == [50, 100, 400, 800]
    assert found["calibration"]["name"] == "nano"
    decayed = tmp_path / "decayed"
    trained(decayed, weights_at(run, 1_000), 1_000, Decay(shape="linear", steps=60).shares, seed=9)
    known = json.loads(pma(*asked, "--steps", 200, "--annealed", decayed, "--json").stdout)
    assert known["annealed"][0]["from_step"] == 1_000
    assert known["loss"] == pytest.approx(found["loss"] + known["moved_by_annealed"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which decay of the run? Such as: --anneal cosine --tokens 250M"),
        (("--anneal", "cosine"), "how long is the decay? Give --steps or --tokens"),
        (("--anneal", "cubic", "--steps", 9), "there is no decay 'cubic'; there are linear, cosine, 1-sqrt"),
        (("--anneal", "cosine", "--tokens", 9), "--tokens 9 is less than a step of 100 tokens"),
        (("--anneal", "cosine", "--steps", 9, "--from", 990), "starts at step 990, of which there is no"),
        (("--anneal", "cosine", "--steps", 9, "--from", 100), "5 checkpoints at the constant rate"),
        (("--anneal", "cosine", "--steps", 9, "--from", 100, "--probe"), "5 checkpoints at the constant"),
        (("--anneal", "cosine", "--steps", 9, "--calibration", "x"), "--calibration x: no such file"),
        (("--anneal", "cosine", "--steps", 9, "--curve", "c.csv"), "--curve: for forecasts from logs"),
        (
            ("--anneal", "cosine", "--steps", 9, "--probe"),
            "is another trainer's run. With that trainer, go on",
        ),
    ],
)
def test_requests_that_cannot_be_met(
    run: Path, quadratic_text: Path, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    store = ("--store", tmp_path / "results.sqlite")
    shown = pma("forecast", run, "--text", quadratic_text, *store, *arguments)
    assert shown.exit_code != 0
    assert said in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr


def test_a_probe_of_a_run_of_ours_ends_at_a_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, asked = tmp_path / "ours", []
    recipe = load_recipe("nano-dense")
    every = recipe.steps_for(recipe.run.checkpoint_every_tokens)
    run_folder.enter(ours, RunRecord(recipe=recipe, text=()))
    shutil.copytree(run, ours, dirs_exist_ok=True)
    monkeypatch.setattr(annealing, "fork", lambda *arguments, **how: asked.append((arguments, how)))
    points, _ = annealing.constant_points(resolve([ours]))
    out = annealing.run_probe(points[-1], Decay(shape="linear", steps=200))
    ((checkpoint, folder), how) = asked[0]
    assert (checkpoint, folder) == (ours / "checkpoint-1200", out)
    steps = how["tokens"] // recipe.tokens_a_step
    assert how["anneal"] == "linear"
    assert steps % every == 0
    assert 0 <= steps - annealing.probe_steps(1_200, Decay(shape="linear", steps=200)) < every
    assert out == ours / ".pma" / "probes" / f"linear-1200-{steps}"
    assert (
        annealing.run_probe(annealing.constant_points(resolve([run]))[0][-1], Decay(shape="linear", steps=9))
        is None
    )
