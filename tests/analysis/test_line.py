"""The search along the line on losses that are parabolas, so that best places and gains are closed forms."""

from typing import Any

import numpy as np
import pytest

from pma.analysis.line import PLACES, search, weights_at
from pma.errors import InputError

DOCUMENTS = 40
TOKENS = np.arange(DOCUMENTS) % 7 + 20.0
CHOOSES = np.arange(DOCUMENTS) % 2 == 0


def parabolas(best: float, *, bend: float = 0.4, noise: float = 0.0, seed: int = 1) -> np.ndarray:
    """Nats of documents of loss 3 + ½ bend (t − best)², with noise that differs from place to place."""
    t_T = np.array(PLACES)
    level_D = 3 + np.random.default_rng(0).standard_normal(DOCUMENTS) * 0.3
    per_token_TD = level_D + 0.5 * bend * (t_T[:, None] - best) ** 2
    per_token_TD = per_token_TD + noise * np.random.default_rng(seed).standard_normal(per_token_TD.shape)
    return per_token_TD * TOKENS


def found(best: float, **how: Any):
    return search(PLACES, parabolas(best, **how), TOKENS, CHOOSES)


def test_weights_on_the_line_make_the_point_on_the_line():
    random = np.random.default_rng(2)
    points, weights = random.standard_normal((5, 30)), np.array([0.1, 0.1, 0.2, 0.25, 0.35])
    last, merge = points[-1], weights @ points
    for t in (-0.25, 0, 0.5, 1, 2):
        np.testing.assert_allclose(weights_at(t, weights) @ points, last + t * (merge - last), atol=1e-12)
        assert sum(weights_at(t, weights)) == pytest.approx(1, abs=1e-12)
    assert weights_at(0, weights) == (0, 0, 0, 0, 1)
    assert weights_at(1, weights) == pytest.approx(weights)


@pytest.mark.parametrize("best", [0.5, 1.25, 1.75])
def test_a_better_place_is_advised_with_the_other_halfs_loss(best):
    line = found(best)
    assert (line.t, line.lowest_t, line.at_the_edge) == (best, best, False)
    told = ~CHOOSES
    level = (parabolas(best)[0] / TOKENS - 0.2 * (PLACES[0] - best) ** 2)[told]
    assert line.loss.value == pytest.approx((level * TOKENS[told]).sum() / TOKENS[told].sum())
    assert line.gain.value == pytest.approx(0.2 * best**2)
    assert line.gain_over_merge is not None
    assert line.gain_over_merge.value == pytest.approx(0.2 * (1 - best) ** 2)
    assert line.at(best).loss == line.loss
    assert line.at(0).gain is None


def test_near_the_merge_the_merge_is_advised():
    line = found(1.05)
    assert (line.t, line.lowest_t, line.ahead, line.gain_over_merge) == (1, 1, None, None)
    assert line.gain.value == pytest.approx(0.2 * (1.05**2 - 0.05**2))


def test_a_place_that_is_better_by_chance_is_not_advised():
    """Where all places are alike, one of nine is the lowest of most texts, and advised of few."""
    found_of_S = [found(1.0, bend=0.0, noise=0.05, seed=seed) for seed in range(200)]
    assert sum(line.lowest_t != 1 for line in found_of_S) > 150
    advised = [line for line in found_of_S if line.t != 1]
    assert len(advised) <= 0.05 * 200 + 6  # two standard deviations
    for line in found_of_S:
        assert (line.t == 1) == (line.ahead is None or line.ahead.low <= 0) == (line.gain_over_merge is None)


def test_between_last_and_a_place_that_is_no_better_last_is_advised():
    """Half-way between two places both are alike, and chance decides which is lower."""
    found_of_S = [found(0.125, noise=0.02, seed=seed) for seed in range(40)]
    assert {line.lowest_t for line in found_of_S} == {0.0, 0.25}
    assert sum(line.t == 0 for line in found_of_S) >= 38
    assert found(0.25).t == 0.25  # where it is better


def test_the_interval_allows_for_the_number_of_places():
    from scipy.stats import t as student

    line = found(1.5, noise=0.05)
    assert line.ahead is not None
    reach = student.ppf(1 - 0.025 / (len(PLACES) - 1), CHOOSES.sum() - 1) * line.ahead.standard_error
    assert line.ahead.low == pytest.approx(line.ahead.value - reach)


def test_what_is_told_is_not_of_the_half_that_chose():
    nats = parabolas(1.5, noise=0.02)
    changed = nats.copy()
    changed[:, CHOOSES] += 3 * TOKENS[CHOOSES]
    one, other = (search(PLACES, each, TOKENS, CHOOSES) for each in (nats, changed))
    assert one.t == other.t == 1.5
    assert (one.loss, one.gain, one.gain_over_merge) == (other.loss, other.gain, other.gain_over_merge)
    assert one.places == other.places
    # and the place is chosen by the other half alone
    changed = nats.copy()
    changed[:, ~CHOOSES] = nats[::-1][:, ~CHOOSES]
    assert search(PLACES, changed, TOKENS, CHOOSES).t == 1.5


def test_an_optimum_beyond_what_was_evaluated_is_said_and_not_told():
    line = found(5.0)
    assert (line.t, line.at_the_edge) == (2, True)
    with pytest.raises(InputError, match=r"t = 5 was not evaluated"):
        line.at(5)
    assert found(-3.0).t == -0.25


def test_a_place_without_a_finite_loss_is_left_out():
    nats = parabolas(2.0)
    nats[-1, 3] = np.inf
    line = search(PLACES, nats, TOKENS, CHOOSES)
    assert (line.t, line.at_the_edge, len(line.places)) == (1.75, True, len(PLACES) - 1)
    nats[PLACES.index(1), 0] = np.nan
    with pytest.raises(InputError, match="last and merge need a finite loss"):
        search(PLACES, nats, TOKENS, CHOOSES)
