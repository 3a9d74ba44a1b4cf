"""Schemes against the published vectors, closed forms and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma import averaging
from pma.errors import UsageError

EVEN = [float(i) for i in range(10)]

# arXiv 2505.12082, section 4.2 and arXiv 2507.17634: N = 10, oldest first
PUBLISHED = {
    "wma": ".0182 .0364 .0545 .0727 .0909 .1091 .1273 .1455 .1636 .1818",
    "ema:0.1": ".3874 .0430 .0478 .0531 .0590 .0656 .0729 .0810 .0900 .1000",
    "ema:0.2": ".1342 .0336 .0419 .0524 .0655 .0819 .1024 .1280 .1600 .2000",
    "1-sqrt": ".3162 .1310 .1005 .0847 .0747 .0675 .0621 .0578 .0543 .0513",
    "cosine": ".0245 .0710 .1106 .1394 .1545 .1545 .1394 .1106 .0710 .0245",
    "sma": " ".join([".1"] * 10),
    "linear": " ".join([".1"] * 10),
}

positions_lists = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=24).map(
    lambda gaps: np.cumsum(gaps).tolist()
)
names = st.one_of(
    st.sampled_from(["sma", "wma", "linear", "cosine", "1-sqrt"]),
    st.floats(0.01, 1).map(lambda a: f"ema:{a}"),
    st.floats(0.01, 0.99).map(lambda a: f"ema-normalized:{a}"),
    st.tuples(st.sampled_from(["linear", "cosine", "1-sqrt"]), st.floats(0, 1)).map(
        lambda x: f"{x[0]}:{x[1]}"
    ),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vectors(name: str) -> None:
    expected = [float(x) for x in PUBLISHED[name].split()]
    np.testing.assert_allclose(averaging.scheme(name)(EVEN), expected, atol=5e-5)


@given(names, positions_lists)
def test_weights_sum_to_one_and_are_not_negative(name: str, positions: list[float]) -> None:
    weights = averaging.scheme(name)(positions)
    assert len(weights) == len(positions)
    assert abs(weights.sum() - 1) < 1e-12
    assert (weights >= -1e-15).all()


@given(names)
def test_one_checkpoint_has_weight_one(name: str) -> None:
    np.testing.assert_allclose(averaging.scheme(name)([7.0]), [1.0])


@given(st.floats(0.01, 0.99), st.integers(1, 20))
def test_ema_is_equation_4_unrolled(alpha: float, count: int) -> None:
    identity = np.eye(count)
    mean = identity[0]
    for i in range(1, count):
        mean = alpha * identity[i] + (1 - alpha) * mean
    np.testing.assert_allclose(averaging.scheme(f"ema:{alpha}")(list(range(count))), mean, atol=1e-14)


def test_the_two_emas_differ_in_the_oldest_weight() -> None:
    whole, normalized = averaging.scheme("ema:0.2")(EVEN), averaging.scheme("ema-normalized:0.2")(EVEN)
    np.testing.assert_allclose(normalized[1:] / normalized[1], whole[1:] / whole[1])
    assert whole[0] / whole[1] > 3.9 > 1 > normalized[0] / normalized[1]


def test_one_minus_sqrt_weighs_the_oldest_most() -> None:
    weights = averaging.scheme("1-sqrt")(EVEN)
    assert weights[0] == max(weights)
    assert (np.diff(weights) < 0).all()


def test_a_floor_leaves_its_share_to_the_newest() -> None:
    plain, floored = averaging.scheme("cosine")(EVEN), averaging.scheme("cosine:0.1")(EVEN)
    expected = 0.9 * plain
    expected[-1] += 0.1
    np.testing.assert_allclose(floored, expected)


def test_uneven_spacing_weighs_by_distance() -> None:
    # linear decay over positions 0, 1, 4: x = 0, 1/6, 4/6 and 1
    np.testing.assert_allclose(averaging.scheme("linear")([0.0, 1.0, 4.0]), [1 / 6, 1 / 2, 1 / 3])


def test_given_weights_stay_as_they_are() -> None:
    exact = averaging.scheme("wma")(EVEN)
    assert averaging.given(exact).tolist() == exact.tolist()


@pytest.mark.parametrize("values", [[0.5, 0.6], [float("nan"), 1.0], [float("inf"), 0.0]])
def test_given_weights_must_sum_to_one(values: list[float]) -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        averaging.given(values)


@pytest.mark.parametrize(
    "name", ["mean", "ema", "ema:x", "ema:0", "ema:1.5", "sma:2", "cosine:2", "", "1-sqrt:-0.1", "ema:nan"]
)
def test_unknown_schemes_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        averaging.scheme(name)(EVEN)


def test_a_decay_needs_ascending_positions() -> None:
    with pytest.raises(UsageError, match="ascend"):
        averaging.scheme("cosine")([1.0, 3.0, 2.0])


falling = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(lambda w: sorted(w, reverse=True))


@settings(max_examples=50)
@given(falling, st.integers(0, 2**32 - 1))
def test_the_decay_identity_on_random_trajectories(rates: list[float], seed: int) -> None:
    updates = np.random.default_rng(seed).standard_normal((len(rates), 5))
    checkpoints = np.vstack([np.zeros(5), -np.cumsum(updates, axis=0)])
    weights = averaging.weights_from_rates(rates)
    np.testing.assert_allclose(weights @ checkpoints, -(np.array(rates) @ updates), atol=1e-12)
    assert abs(weights.sum() - 1) < 1e-12
    np.testing.assert_allclose(averaging.rates_from_weights(weights.tolist()), rates, atol=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12))
def test_weights_go_to_rates_and_back(raw: list[float]) -> None:
    weights = np.array(raw) / sum(raw)
    back = averaging.weights_from_rates(
        np.minimum(averaging.rates_from_weights(weights.tolist()), 1.0).tolist()
    )
    np.testing.assert_allclose(back, weights, atol=1e-12)


def test_sma_is_linear_decay() -> None:
    rates = averaging.rates_from_weights([0.1] * 10)
    np.testing.assert_allclose(rates, 1 - np.arange(1, 10) / 10)


def test_rates_that_rise_are_refused() -> None:
    with pytest.raises(UsageError, match="fall"):
        averaging.weights_from_rates([0.5, 0.7])
