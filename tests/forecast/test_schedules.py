import math

import numpy as np
import pytest

from pma.errors import InputError, UsageError
from pma.forecast.schedules import from_pairs


def test_between_knots_the_rate_is_a_line_and_sums_count_every_step() -> None:
    schedule = from_pairs([0, 10, 20], [1.0, 1.0, 0.0])
    assert schedule.rates_T.tolist() == [1.0] * 11 + [0.1 * (10 - i) for i in range(1, 11)] or np.allclose(
        schedule.rates_T, [1.0] * 11 + [0.1 * (10 - i) for i in range(1, 11)]
    )
    assert schedule.sums[0] == 0
    assert schedule.sums[-1] == pytest.approx(10 + 4.5)
    assert schedule.gaps.sum() == pytest.approx(1.0)
    assert schedule.decay_steps == 10
    assert schedule.notes == ()


def test_a_change_in_a_log_that_repeats_its_rate_is_a_step_at_the_later_row() -> None:
    schedule = from_pairs([0, 10, 20, 30, 40, 50], [1, 1, 1, 0.5, 0.5, 0.5])
    assert schedule.rates_T[29] == 1.0
    assert schedule.rates_T[30] == 0.5
    # four knots are a slope: nothing repeats
    assert from_pairs([0, 10, 20, 30], [1, 1, 0.5, 0.5]).rates_T[15] == 0.75


def test_what_a_log_leaves_out_before_its_first_row_is_a_warmup_and_is_said() -> None:
    assumed = from_pairs([100, 200], [2.0, 2.0], where="a.csv")
    assert assumed.rates_T[[0, 50, 100]].tolist() == [0.0, 1.0, 2.0]
    assert "a.csv begins at step 100: a linear warmup" in assumed.notes[0]
    told = from_pairs([100, 200], [2.0, 2.0], warmup_steps=10)
    assert told.rates_T[[0, 5, 10, 50]].tolist() == [0.0, 1.0, 2.0, 2.0]
    assert told.notes == ()
    none = from_pairs([100, 200], [2.0, 2.0], warmup_steps=0)
    assert none.rates_T[0] == 0.0  # before the first update there is no rate to fall from
    assert none.rates_T[1] == 2.0
    logged_from_the_start = from_pairs([1, 2, 3], [2.0, 2.0, 2.0])
    assert logged_from_the_start.rates_T.tolist() == [2.0] * 4
    assert logged_from_the_start.gaps.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))]
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_decays_end_at_their_floor(shape: str, middle: float, floor: float) -> None:
    schedule = from_pairs([0, 100], [2.0, 2.0]).annealed(shape, 40, floor=floor)
    assert schedule.last_step == 140
    assert schedule.rates_T[120] == pytest.approx(2 * (floor + (1 - floor) * middle))
    assert schedule.rates_T[140] == pytest.approx(2 * floor, abs=1e-12)
    assert (np.diff(schedule.rates_T) <= 0).all()
    assert (schedule.rates_T >= 2 * floor).all()


def test_held_and_until() -> None:
    schedule = from_pairs([0, 10], [1.0, 0.5])
    assert schedule.held(5).rates_T[-1] == 0.5
    assert schedule.held(5).last_step == 15
    assert schedule.until(5).last_step == 5
    with pytest.raises(UsageError, match="step 11 is not in the schedule, which has steps 1 to 10"):
        schedule.until(11)


@pytest.mark.parametrize(
    ("steps", "rates", "said"),
    [
        ([], [], "has no rows"),
        ([1, 3, 2], [1, 1, 1], "steps do not rise: row 3 has step 2 after 3"),
        ([1, 1], [1, 1], "row 2 has step 1 after 1"),
        ([1, 2.5], [1, 1], "row 2 has step 2.5"),
        ([-1, 2], [1, 1], "row 1 has step -1"),
        ([1, math.nan], [1, 1], "row 2 has step nan"),
        ([1, 2], [1, math.nan], "the learning rate at step 2 is nan"),
        ([1, 2], [1, math.inf], "the learning rate at step 2 is inf"),
        ([1, 2], [1, -1], "the learning rate at step 2 is -1"),
        ([1, 2], [0, 0], "every learning rate is 0"),
        ([1, 10**12], [1, 1], "too long"),
    ],
)
def test_bad_pairs(steps: list[float], rates: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_pairs(steps, rates, where="it")


def test_bad_decays() -> None:
    schedule = from_pairs([0, 10], [1.0, 1.0])
    for shape, steps, floor in (("square", 5, 0.0), ("linear", 0, 0.0), ("linear", 5, 1.5)):
        with pytest.raises(UsageError):
            schedule.annealed(shape, steps, floor=floor)
    with pytest.raises(InputError, match="too long"):
        schedule.annealed("linear", 10**9)
