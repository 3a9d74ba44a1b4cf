"""Shares of a gain: against the estimator of one run, a simulation, and what was put in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pma.evaluation.evaluate import Evaluation
from pma.evaluation.paired import gain_recovered
from pma.studies import seeds
from pma.studies.data import Text
from pma.studies.making import Anneal, Trunk
from pma.studies.presets import preset

from .made_up import DOCUMENTS, TOKENS_A_DOCUMENT, case


def test_of_one_seed_a_share_is_the_gain_recovered() -> None:
    models = case({"last": 3.0, "merge": 2.9, "annealed": 2.8}, seeds=1, chance=0.1)
    found = models.share(("last", "merge"), ("last", "annealed"))
    last, merge, annealed = (models.readings[name][0].text for name in ("last", "merge", "annealed"))
    expected = gain_recovered(last.nats, merge.nats, annealed.nats, last.tokens)
    assert found is not None
    assert expected is not None
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_a_share_is_undefined_where_nothing_may_have_been_possible() -> None:
    assert case({"a": 3.0, "b": 2.9, "c": 3.0}, chance=0.1).share(("a", "b"), ("a", "c")) is None
    assert case({"a": 3.0, "b": 2.9, "c": 3.2}).share(("a", "b"), ("a", "c")) is None


def test_shares_hold_the_truth_as_often_as_they_say() -> None:
    """Of three quarters of a gain, both with chance by seed and by document."""
    rng = np.random.default_rng(3)
    none = case({"none": 0.0}, seeds=1, chance=0.0).readings["none"][0].text
    zero, held = _with_losses(none, np.zeros(DOCUMENTS)), 0
    for _ in range(300):
        document_D, gained, possible = rng.normal(0, 0.05, DOCUMENTS), [], []
        for _ in range(3):
            gain_D = 0.4 + rng.normal(0, 0.05) + rng.normal(0, 0.1, DOCUMENTS)
            part_D = 0.75 * gain_D + rng.normal(0, 0.01) + document_D
            gained.append((_with_losses(none, part_D), zero))
            possible.append((_with_losses(none, gain_D), zero))
        found = seeds.share(gained, possible)
        assert found is not None
        held += found.low <= 0.75 <= found.high
    assert 0.92 <= held / 300 <= 0.995


def _with_losses(like: Evaluation, loss_D: np.ndarray) -> Evaluation:
    return replace(like, nats=tuple(map(float, loss_D * TOKENS_A_DOCUMENT)))


def test_one_gain_beyond_another_is_their_difference() -> None:
    models = case({"a": 3.0, "b": 2.9, "c": 2.5, "d": 2.45}, chance=0.0)
    found = models.gain_beyond(("a", "b"), ("c", "d"))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.05, 0.05, 0.05))


def test_models_of_another_case_come_under_new_names() -> None:
    early, late = case({"raw": 3.0}), case({"raw": 2.0})
    both = late.with_models(early, {"before": "raw"})
    assert both.readings == {"raw": late.readings["raw"], "before": early.readings["raw"]}


def test_a_fork_s_checkpoints_up_to_the_fork_are_its_trunk_s(tmp_path: Path) -> None:
    size = preset("toy").sizes[0]
    trunk = Trunk(recipe=size.at(1e-3, 0), text=Text(paths=(), digest=""))
    fork = Anneal(trunk=trunk, step=14, steps=4)
    assert fork.checkpoint(tmp_path, 14) == trunk.checkpoint(tmp_path, 14)
    assert fork.checkpoint(tmp_path, 16) == fork.folder(tmp_path) / "checkpoint-16"
