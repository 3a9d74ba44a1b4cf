"""Breakaways: found where they were put, told apart, and not found where there are none."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pma.logs.breakaways import Breakaway, Kind, breakaways, find
from pma.logs.curves import collect

from .curves import healthy_grad_norm, healthy_loss

MADS_A_SIGMA = 1 / 0.6745  # a normal's MAD is 0.6745 of its standard deviation


def found(values: NDArray[np.float64], quantity: str = "loss", every: int = 1) -> list[Breakaway]:
    steps = np.arange(1, len(values) + 1, dtype=np.int64) * every
    return find(steps, values, quantity)  # type: ignore[arg-type]


# ---- healthy curves ----


@pytest.mark.parametrize("correlated", [0.0, 0.5])
def test_healthy_losses_do_not_alarm(correlated: float) -> None:
    alarms = sum(len(found(healthy_loss(2000, seed, correlated=correlated))) for seed in range(10))
    assert alarms == 0


def test_healthy_gradient_norms_do_not_alarm() -> None:
    assert sum(len(found(healthy_grad_norm(2000, seed), "grad_norm")) for seed in range(10)) == 0


def test_a_drop_of_the_rate_and_a_decay_are_no_breakaways() -> None:
    loss = healthy_loss(1500, 1)
    loss[500:] -= 0.3  # the rate drops to a tenth
    loss[1000:] -= np.linspace(0, 0.4, 500)  # a decay to zero
    assert found(loss) == []


def test_a_steep_fall_that_flattens_is_no_breakaway() -> None:
    loss = np.concatenate([np.linspace(8, 3, 150), np.full(150, 3.0)])
    loss += 0.01 * np.random.default_rng(0).standard_normal(300)
    assert found(loss) == []


def test_a_rounded_or_constant_curve_has_no_scale_and_does_not_alarm() -> None:
    assert found(np.round(healthy_loss(1000, 2, noise=0.004), 2)) == []
    constant = np.full(300, 2.0)
    constant[200] = 2.01  # half a percent: below any MAD that counts, twelve times
    assert found(constant) == []


# ---- known spikes ----


@pytest.mark.parametrize("mads", [30, 50, 100])
def test_every_single_spike_of_known_size_is_found_at_its_step(mads: float) -> None:
    for seed in range(20):
        loss = healthy_loss(1000, seed)
        at = 300 + 30 * seed
        loss[at] += mads * 0.05 / MADS_A_SIGMA
        (only,) = found(loss, every=10)
        assert (only.first_step, only.peak_step, only.seen_step) == (10 * (at + 1),) * 3
        assert (only.kind, only.good_step) == (Kind.BLIP, 10 * at)
        assert only.size_mads == pytest.approx(mads, abs=0.5 * mads)  # noise of the value and of the MAD


@pytest.mark.parametrize("sigmas", [6, 10])
def test_a_lasting_rise_is_found_within_20_steps_by_the_past_alone(sigmas: float) -> None:
    for seed in range(20):
        loss = healthy_loss(1000, seed)
        loss[600:] += sigmas * 0.05
        with_hindsight, at_the_time = found(loss[:700]), found(loss[:620])
        assert [b.first_step for b in at_the_time] == [b.first_step for b in with_hindsight]
        (only,) = with_hindsight
        assert only.kind is Kind.COLLAPSE
        assert 601 <= only.first_step <= only.seen_step <= 620


def test_a_gradual_collapse_is_found_while_it_is_small() -> None:
    for seed in range(20):
        loss = healthy_loss(1000, seed)
        loss[600:] += np.minimum(np.arange(400) * 0.03, 2.0)  # 2 up within 67 steps; 0.6 after 20
        (only,) = found(loss)
        assert only.kind is Kind.COLLAPSE
        assert 601 <= only.first_step <= only.seen_step <= 620


def test_a_rise_that_returns_is_told_from_a_collapse() -> None:
    loss = healthy_loss(1000, 3)
    loss[600:660] += 1.5 * np.exp(-np.arange(60) / 15)
    (only,) = found(loss)
    assert only.kind is Kind.SPIKE
    assert only.first_step == only.peak_step == 601
    assert 620 <= only.last_step <= 660
    assert only.peak == loss[600]
    assert only.level == pytest.approx(np.median(loss[576:592]))


def test_two_spikes_are_two_and_the_first_does_not_blind_for_the_second() -> None:
    loss = healthy_loss(1000, 4)
    loss[500:520] += 2
    loss[540:560] += 2
    assert [(b.first_step, b.last_step) for b in found(loss)] == [(501, 520), (541, 560)]


def test_not_a_number_is_its_own_kind_wherever_it_occurs() -> None:
    loss = healthy_loss(600, 5)
    loss[3] = math.nan  # before there is any past to compare with
    loss[300] = math.inf
    loss[500:] = math.nan
    kinds = [(b.kind, b.first_step, b.last_step, b.size_mads) for b in found(loss)]
    nan = Kind.NOT_A_NUMBER
    assert kinds == [(nan, 4, 4, math.inf), (nan, 301, 301, math.inf), (nan, 501, 600, math.inf)]


def test_a_value_outside_at_the_very_end_is_not_settled() -> None:
    loss = healthy_loss(600, 6)
    loss[-2:] += 2
    assert [b.kind for b in found(loss)] == [Kind.UNSETTLED]


def test_gradient_norms_are_judged_by_factors() -> None:
    norms = healthy_grad_norm(1000, 7)
    norms[400] *= 2  # within what norms do
    norms[600:605] *= 200
    norms[800] = 0.0  # no gradient at all is no rise
    (only,) = found(norms, "grad_norm")
    assert (only.first_step, only.last_step, only.kind) == (601, 605, Kind.SPIKE)
    assert only.level == pytest.approx(float(np.median(norms[500:590])), rel=0.2)


def test_both_quantities_of_a_log_by_first_step() -> None:
    loss, norms = healthy_loss(600, 8), healthy_grad_norm(600, 8)
    norms[299] *= 1000
    loss[300:303] += 3
    rows = [{"step": i + 1, "loss": loss[i], "grad_norm": norms[i]} for i in range(600)]
    both = breakaways(collect(rows, ()))
    assert [(b.quantity, b.first_step) for b in both] == [("grad_norm", 300), ("loss", 301)]


# ---- properties ----


@given(
    st.lists(st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), max_size=120),
    st.sampled_from(["loss", "grad_norm"]),
)
def test_any_curve_is_judged_without_failing(values: list[float], quantity: str) -> None:
    for b in found(np.array(values, dtype=np.float64), quantity):
        assert b.good_step <= b.first_step <= b.peak_step <= b.last_step
        assert b.first_step <= b.seen_step
        assert b.entries >= 1


@given(st.integers(0, 50), st.integers(100, 400), st.floats(0.5, 5))
def test_what_is_found_so_far_does_not_depend_on_what_comes(seed: int, cut: int, height: float) -> None:
    loss = healthy_loss(400, seed)
    loss[250:270] += height
    seen_whole = {(b.first_step, b.seen_step) for b in found(loss) if b.seen_step <= cut}
    assert {(b.first_step, b.seen_step) for b in found(loss[:cut])} == seen_whole


@given(st.floats(0.01, 100), st.integers(0, 20))
def test_the_unit_of_the_loss_does_not_matter(factor: float, seed: int) -> None:
    loss = healthy_loss(400, seed)
    loss[300:310] += 2
    there, scaled = found(loss), found(loss * factor)
    assert [(b.first_step, b.last_step) for b in there] == [(b.first_step, b.last_step) for b in scaled]
