"""When a merge's advantage is gone, and its mean over a continuation."""

from typing import Any

import numpy as np
import pytest

from pma.evaluation.evaluate import Evaluation
from pma.studies import seeds
from pma.studies.data import Text
from pma.studies.making import Trunk
from pma.studies.optimizer import AT_END, RAW, Course, averaged, gone, within
from pma.studies.telling import Verdict

from ..pretraining.recipes import tiny_recipe


def bounds(*lows: float) -> list[dict[str, Any]]:
    return [{"low": low, "high": low + 1} for low in lows]


def test_an_advantage_is_gone_where_it_does_not_come_back() -> None:
    steps = [25, 50, 75, 100]
    assert gone(bounds(0.3, 0.1, -0.1, -0.2), steps) == 75
    assert gone(bounds(0.3, -0.1, 0.1, -0.2), steps) == 100, "at 50 it was gone by chance"
    assert gone(bounds(0.3, 0.2, 0.1, 0.05), steps) is None
    assert gone(bounds(-0.3, -0.2, -0.1, 0.0), steps) == 25


def test_parity_is_shown_and_not_assumed() -> None:
    assert within({"low": -0.008, "high": 0.009}) is Verdict.AGREES
    assert within({"low": -0.1, "high": 0.1}) is Verdict.CANNOT_TELL
    assert within({"low": 0.02, "high": 0.1}) is Verdict.DISAGREES
    assert within({"low": -0.1, "high": -0.02}) is Verdict.DISAGREES


def evaluation(nats: Any) -> Evaluation:
    return Evaluation(
        name="", text_digest="", context_tokens=8, text_bytes=100, nats=tuple(nats), tokens=(10, 20, 30, 40)
    )


def test_the_mean_advantage_is_the_mean_of_the_advantages() -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 5, 4))
    raw, other = ([evaluation(nats) for nats in course] for course in drawn)
    found = seeds.loss_gain([(averaged(raw), averaged(other))])
    each = [seeds.loss_gain([pair]).value for pair in zip(raw, other, strict=True)]
    assert found.value == pytest.approx(np.mean(each))
    independent = (
        np.sqrt(sum(seeds.loss_gain([pair]).standard_error ** 2 for pair in zip(raw, other, strict=True))) / 5
    )
    alike = seeds.loss_gain([(averaged([raw[0]] * 5), averaged([other[0]] * 5))])
    assert alike.standard_error > 2 * independent, "checkpoints of one text are no independent draws"


def test_all_is_compared_at_the_same_steps() -> None:
    run = Trunk(recipe=tiny_recipe(), text=Text.of(()))
    models = Course(run=run, start=2_000, every=25, until=2_100, last=10).models()
    assert (models["merge", 2_000].last, models[RAW, 2_000].last) == (10, 1)
    for name in (RAW, "newest", "second-moment", "average", "reset"):
        assert [step for other, step in models if other == name and step not in (2_000, AT_END)] == [
            2_050,
            2_100,
        ]
        assert [models[name, step].at for step in (2_050, 2_100)] == [2_050, 2_100]
        assert (models[name, AT_END].at, models[name, AT_END].last) == (2_100, 10)
    assert len({model.run for (_, step), model in models.items() if step == 2_100}) == 5
