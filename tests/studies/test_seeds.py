"""Intervals over seeds and documents: against scipy, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pma.evaluation.evaluate import Evaluation
from pma.evaluation.paired import paired_difference
from pma.studies import seeds
from pma.studies.telling import Finding, Told, Verdict, most, sign_verdict


def evaluation(nats_D: np.ndarray, tokens_D: np.ndarray) -> Evaluation:
    """An evaluation of nothing but these numbers."""
    return Evaluation(
        name="made up",
        text_digest="the same",
        context_tokens=8,
        text_bytes=1,
        nats=tuple(map(float, nats_D)),
        tokens=tuple(map(int, tokens_D)),
    )


def test_of_values_is_students_interval() -> None:
    values = [0.1, 0.4, 0.2, 0.35]
    found = seeds.of_values(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.by_seed == tuple(values)


def test_of_one_value_nothing_is_sure() -> None:
    found = seeds.of_values([0.3])
    assert found.low == -np.inf
    assert found.high == np.inf


def test_of_one_seed_it_is_the_paired_difference() -> None:
    rng = np.random.default_rng(0)
    tokens_D = rng.integers(50, 200, 30)
    first, second = (evaluation(rng.normal(3, 0.5, 30) * tokens_D, tokens_D) for _ in range(2))
    found = seeds.loss_gain([(first, second)])
    expected = paired_difference(first.nats, second.nats, tokens_D)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


@pytest.mark.parametrize(("seed_spread", "document_spread"), [(0.05, 0.2), (0.0, 0.5), (0.2, 0.02)])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_spread: float, document_spread: float) -> None:
    """Of a gain made of the truth, a part by seed and a part by document."""
    rng = np.random.default_rng(1)
    truth, held = 0.1, 0
    tokens_D = np.full(40, 100)
    for _ in range(600):
        document_D = rng.normal(0, document_spread, 40)
        pairs = []
        for _ in range(3):
            gain_D = truth + rng.normal(0, seed_spread) + document_D + rng.normal(0, 0.01, 40)
            pairs.append((evaluation(gain_D * tokens_D, tokens_D), evaluation(np.zeros(40), tokens_D)))
        found = seeds.loss_gain(pairs)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 600 <= 0.995


def test_a_ratio_is_undefined_where_its_denominator_may_be_zero() -> None:
    assert seeds.ratio([1.0, 1.1, 0.9], [0.2, -0.2, 0.1]) is None
    found = seeds.ratio([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_verdicts() -> None:
    assert sign_verdict(0.1, 0.2) is Verdict.AGREES
    assert sign_verdict(-0.1, 0.2) is Verdict.CANNOT_TELL
    assert sign_verdict(-0.2, -0.1) is Verdict.DISAGREES
    assert sign_verdict(-0.2, -0.1, claimed_positive=False) is Verdict.AGREES
    assert most([Verdict.AGREES, Verdict.AGREES]) is Verdict.AGREES
    assert most([Verdict.AGREES, Verdict.CANNOT_TELL]) is Verdict.CANNOT_TELL
    assert most([Verdict.AGREES, Verdict.CANNOT_TELL, Verdict.DISAGREES]) is Verdict.DISAGREES


def test_the_verdict_of_a_study_counts_its_findings() -> None:
    findings = [Finding(claim="", verdict=v, evidence="") for v in (Verdict.AGREES, Verdict.CANNOT_TELL)]
    told = Told(set_up="", tables=(), findings=findings, more="")
    assert told.verdict == "1 of 2 agrees, 1 of 2 cannot tell at this size"
    assert Told(set_up="", tables=(), findings=findings[:1], more="").verdict == "agrees"


def test_numbers_are_shown_with_their_interval() -> None:
    assert seeds.shown({"value": -0.1234, "low": -0.2, "high": 0.1}) == "−0.123 (−0.200 to +0.100)"
