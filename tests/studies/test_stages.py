"""Later stages as studies make them: what decides a run, what is read of it, what its numbers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pma.pretraining import run_folder
from pma.studies import fig6, making, presets, seeds
from pma.studies.data import Data, Text
from pma.studies.lab import Lab
from pma.studies.making import Trunk
from pma.studies.stages import (
    LAST,
    MERGE,
    Schedule,
    StageText,
    at_moment,
    constant,
    curve,
    logged,
    moments,
    stage,
)
from pma.studies.telling import Verdict, equal_verdict, not_below_verdict
from pma.studies.workers import pool


def trunk(text: Text | None = None) -> Trunk:
    size = presets.preset("toy").size("dense-a")
    recipe = size.at(1e-3, 0)
    recipe = replace(recipe, run=replace(recipe.run, interval_means=False))
    return Trunk(recipe=recipe, text=text or Text.of(()))


def some_text(path: Path) -> Text:
    documents = [" ".join(f"word{number * 7 + i % 50} is {i} and" for i in range(60)) for number in range(60)]
    path.write_text("\n<|endoftext|>\n".join(documents))
    return Text.of([path])


def some_rows(path: Path) -> Text:
    rows = [{"prompt": f"What is {i} and {7 * i}?", "response": f"It is {8 * i}."} for i in range(200)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Text.of([path])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Two stages on rows from the merge and from last, made for real."""
    home = tmp_path_factory.mktemp("home")
    of_trunk, rows = some_text(home / "text.txt"), some_rows(home / "rows.jsonl")
    data = Data(text=of_trunk, other_domain=Text.of(()), instructions=rows, tasks=())
    preset = presets.preset("toy")
    with pool(1) as workers:
        lab = Lab(home=home, preset=preset, data=data, seeds=(0,), workers=workers)
        text = StageText(trunk=trunk(of_trunk), text=rows, instructions=True)
        schedule = Schedule(name="cosine", peak=1e-3, final=1e-4)
        runs = {start: stage(lab, trunk(of_trunk), start, text, schedule) for start in (LAST, MERGE)}
        lab.make(runs.values())
        yield lab, runs


def test_a_stage_is_made_from_last_and_from_the_merge(made) -> None:
    lab, runs = made
    preset = lab.preset
    records = {start: run_folder.read_record(run.folder(lab.home)) for start, run in runs.items()}
    starts = {start: record.stage.checkpoint for start, record in records.items()}
    assert starts[LAST] == runs[LAST].trunk.checkpoint(lab.home, preset.steps)
    assert starts[MERGE].name.startswith("merged-")
    assert {record.recipe.run.log_every_steps for record in records.values()} == {1}
    for run in runs.values():
        for step in range(preset.every_steps, preset.stage_steps + 1, preset.every_steps):
            assert (run.checkpoint(lab.home, step) / "model.safetensors").is_file()
            assert not (run.checkpoint(lab.home, step) / "optimizer.pt").exists()
        assert making.seconds(run, lab.home)


def test_the_log_of_a_stage_has_every_step(made) -> None:
    lab, runs = made
    for what in ("loss", "grad_norm"):
        series = logged(lab, runs[LAST], what)
        assert series.shape == (lab.preset.stage_steps,)
        assert (series > 0).all()


def test_responses_are_measured_on_the_stages_own_rows(made) -> None:
    lab, runs = made
    end = lab.preset.stage_steps
    models = [at_moment(run, step) for step in (0, end) for run in runs.values()]
    held_out = lab.measure(models, of=runs[LAST].text)
    rows = (runs[LAST].folder(lab.home) / "text" / "held_out.jsonl").read_text().splitlines()
    assert {len(reading.text.nats) for reading in held_out} == {len(rows)}
    assert held_out[2].text.loss.value < held_out[0].text.loss.value  # it has learnt
    again = lab.measure(models[2:], where="held_out")
    assert [each.text for each in again] == [each.text for each in held_out[2:]]
    old = lab.measure(models[:1], of=runs[LAST].text.needs()[0], cloze=0)
    assert old == lab.measure(models[:1], cloze=0)


def test_what_decides_a_stage() -> None:
    text = StageText(trunk=trunk(), text=Text.of(()), instructions=False)
    lab = Lab(home=Path(), preset=presets.preset("toy"), data=None, seeds=(0,), workers=None)  # type: ignore[arg-type]
    schedule = constant("one", 1e-3)
    one = stage(lab, trunk(), LAST, text, schedule)
    assert one == stage(lab, trunk(), LAST, text, constant("another name", 1e-3))
    others = [
        stage(lab, trunk(), MERGE, text, schedule),
        stage(lab, trunk(), LAST, text, Schedule(name="one", peak=1e-3, final=1e-4)),
        stage(lab, trunk(), LAST, replace(text, instructions=True), schedule),
        replace(one, warmup_steps=1),
    ]
    assert len({one, *others}) == 5
    assert one.folder(Path("home")).name.startswith("stage-")


def test_moments_are_checkpoints() -> None:
    for name in ("toy", "cpu", "gpu"):
        preset = presets.preset(name)
        lab = Lab(home=Path(), preset=preset, data=None, seeds=(0,), workers=None)  # type: ignore[arg-type]
        steps = moments(lab)
        assert steps[0] == 0
        assert steps[-1] == preset.stage_steps
        assert all(step % preset.every_steps == 0 for step in steps)


def test_schedules_of_the_paper() -> None:
    found = [(each.peak, each.final, each.shape) for each in fig6.schedules(3e-3)]
    assert found[0] == (3e-3, 3e-3, "constant")
    assert found[1][:2] == pytest.approx((3e-3, 3e-4))
    assert found[2][:2] == pytest.approx((1e-3, 1e-4))


def test_a_curve_is_means_over_stretches() -> None:
    found = curve(np.arange(48.0))
    assert len(found) == 24
    assert found[0] == {"step": 1.5, "value": 0.5}
    assert found[-1] == {"step": 47.5, "value": 46.5}


def test_series_are_paired_by_stretch() -> None:
    rng = np.random.default_rng(1)
    first_T, second_T = rng.normal(1, 0.1, (2, 40))
    found = seeds.series_gain([(first_T, second_T)], 10)
    means = (first_T - second_T).reshape(4, 10).mean(axis=1)
    low, high = stats.t.interval(0.95, 3, loc=means.mean(), scale=stats.sem(means))
    assert (found.value, found.low, found.high) == pytest.approx((means.mean(), low, high))


@pytest.mark.parametrize(
    ("low", "high", "equal", "not_below"),
    [
        (-0.5, 0.5, Verdict.AGREES, Verdict.AGREES),
        (0.5, 2.0, Verdict.CANNOT_TELL, Verdict.AGREES),
        (1.5, 2.0, Verdict.DISAGREES, Verdict.AGREES),
        (-2.0, 0.5, Verdict.CANNOT_TELL, Verdict.CANNOT_TELL),
        (-2.0, -1.5, Verdict.DISAGREES, Verdict.DISAGREES),
        (-2.0, 2.0, Verdict.CANNOT_TELL, Verdict.CANNOT_TELL),
        (None, None, Verdict.CANNOT_TELL, Verdict.CANNOT_TELL),
    ],
)
def test_verdicts_with_a_margin_of_one(low, high, equal: Verdict, not_below: Verdict) -> None:
    assert equal_verdict(low, high, 1.0) is equal
    assert not_below_verdict(low, high, 1.0) is not_below
