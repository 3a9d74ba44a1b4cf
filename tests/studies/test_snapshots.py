"""Which snapshots are compared with which means, and that those means are the average over every step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pma import verbs
from pma.pretraining import Recipe
from pma.studies import making
from pma.studies.data import Text
from pma.studies.making import Trunk
from pma.studies.presets import preset
from pma.studies.snapshots import EXACT, LAST, Window, enough, windows

from ..pretraining.recipes import tiny_recipe, tiny_text

STEPS = 12


def trunk(root: Path, every_steps: int, *, means: bool) -> Trunk:
    """The same training, with checkpoints as far apart as asked for."""
    recipe: Recipe = tiny_recipe(steps=STEPS)
    run = replace(recipe.run, checkpoint_every_tokens=every_steps * 64, interval_means=means)
    made = Trunk(recipe=replace(recipe, run=run), text=Text.of(sorted(tiny_text(root / "text").iterdir())))
    for need in (*made.needs(), made):
        making.ensure(need, root / "home")
    return made


@pytest.mark.parametrize("every_steps", [2, 6])
def test_the_mean_of_stored_means_is_the_average_over_every_step(tmp_path: Path, every_steps: int) -> None:
    home = tmp_path / "home"
    each_step = trunk(tmp_path, 1, means=False)
    weights = [
        load_file(each_step.checkpoint(home, step) / "model.safetensors") for step in range(1, STEPS + 1)
    ]
    run = trunk(tmp_path, every_steps, means=True)
    exact = Window(at=STEPS, steps=STEPS, every=every_steps).models(run)[EXACT]
    merged = verbs.average(exact.choice(home), exact.options())
    snapshots = replace(exact, use="snapshots")
    sampled = verbs.average(snapshots.choice(home), snapshots.options())
    for name, found in merged.items():
        mean = np.mean([step[name].astype(np.float64) for step in weights], axis=0)
        assert np.allclose(found.numpy(), mean, atol=1e-6)
        assert not np.allclose(sampled[name].numpy(), mean, atol=1e-4)  # it is not so of any average


def test_snapshots_lie_at_ends_of_equal_parts_or_in_their_middles(tmp_path: Path) -> None:
    window = Window(at=2_000, steps=500, every=25)
    run = Trunk(recipe=tiny_recipe(), text=Text.of(()))
    models = window.models(run)
    assert window.counts == (2, 4, 5, 10, 20)
    steps = {
        name: [model.at - model.every * back for back in reversed(range(model.last))]
        for name, model in models.items()
    }
    assert steps["ends 2"] == [1_750, 2_000]
    assert steps["middles 2"] == [1_625, 1_875]
    assert steps["ends 5"] == [1_600, 1_700, 1_800, 1_900, 2_000]
    assert steps[EXACT] == list(range(1_525, 2_001, 25))
    assert steps[LAST] == [2_000]
    halves = Window(at=2_000, steps=250, every=25).models(run)
    assert "middles 2" not in halves, "no checkpoint lies at step 1,812.5"


def test_counts_divide_the_window() -> None:
    assert Window(at=2_000, steps=250, every=25).counts == (2, 5, 10)
    assert Window(at=24, steps=6, every=2).counts == (3,)


@pytest.mark.parametrize("name", ["cpu", "gpu", "toy"])
def test_no_window_reaches_into_the_warmup(name: str) -> None:
    size = preset(name)
    warmup = size.sizes[0].recipe.optimizer.warmup_steps
    found = windows(size, warmup)
    assert found
    assert {window.at for window in found} == set(size.stages)
    assert all(window.at - window.steps >= warmup for window in found)


def models_of(highs: dict[int, float]) -> dict[str, dict[str, dict[str, float]]]:
    return {f"ends {count}": {"above_exact": {"high": high}} for count, high in highs.items()}


def test_enough_snapshots_are_enough_from_there_on() -> None:
    assert enough(models_of({2: 0.05, 4: 0.01, 5: 0.004, 10: 0.001, 20: 0.0})) == 5
    assert enough(models_of({2: 0.05, 4: 0.001, 5: 0.02, 10: 0.001, 20: 0.0})) == 10, "4 was luck"
    assert enough(models_of({2: 0.05, 10: 0.02})) is None
