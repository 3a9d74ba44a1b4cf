"""Paired differences against scipy and closed forms."""

import numpy as np
import pytest
from scipy import stats

from pma.errors import InputError
from pma.evaluation.paired import by_document, gain_recovered, mean_estimate, paired_difference


def test_equal_counts_are_the_paired_t_test() -> None:
    random = np.random.default_rng(0)
    a, b, counts = random.normal(3, 1, 40), random.normal(2.8, 1, 40), np.full(40, 7)
    found = paired_difference(a, b, counts)
    reference = stats.ttest_rel(a / 7, b / 7)
    low, high = reference.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx(((a - b).mean() / 7, low, high))


def test_unequal_counts_weigh_documents_by_their_tokens() -> None:
    assert mean_estimate([10.0, 2.0], [5, 1]).value == 2.0


def test_the_error_of_a_ratio_is_what_repetition_gives() -> None:
    random = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(2000):
        counts = random.integers(50, 500, 60)
        nats = counts * random.normal(3, 0.5, 60)
        found = mean_estimate(nats, counts)
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)


def test_gain_recovered() -> None:
    counts = np.full(20, 10)
    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    last = 30 + noise
    share = gain_recovered(last, last - 0.75 - 0.1 * noise, last - 1.5, counts)
    assert share is not None
    assert share.value == pytest.approx(0.5, abs=0.01)
    assert share.low < 0.5 < share.high
    assert gain_recovered(last, last - 1, last + noise, counts) is None  # annealing that did nothing
    assert gain_recovered(last, last + 1, last + 2, counts) is None  # annealing that made it worse


def test_a_pairing_is_sharper_than_its_parts() -> None:
    base = np.random.default_rng(0).normal(3, 1, 30) * 100
    counts = np.full(30, 100)
    assert paired_difference(base, base - 5, counts).standard_error < 1e-12
    assert mean_estimate(base, counts).standard_error > 0.1


def test_one_document_has_no_error() -> None:
    with pytest.raises(InputError, match="two held-out documents"):
        mean_estimate([1.0], [1])


def test_items_are_summed_by_document() -> None:
    sums, counts = by_document([0, 2, 2], [1.0, 0.0, 1.0], 3)
    assert sums.tolist() == [1.0, 0.0, 1.0]
    assert counts.tolist() == [1.0, 0.0, 2.0]
