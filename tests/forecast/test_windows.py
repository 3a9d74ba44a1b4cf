from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma.errors import InputError
from pma.forecast.windows import FEWEST_CHECKPOINTS, probe_windows


def test_windows_of_a_regular_run() -> None:
    windows = probe_windows(range(25, 1001, 25), 1000)
    assert windows[0] == (1000,)
    at_the_end = [window for window in windows if window[-1] == 1000 and len(window) > 1]
    assert [len(window) for window in at_the_end] == [2, 4, 10, 20]
    assert all(b - a == 25 for window in windows for a, b in pairwise(window))
    # neighbouring ends share half of their checkpoints, from a third of the run on
    ends = [window[-1] for window in windows if len(window) == 10]
    assert ends == [1000, 875, 750, 625, 500]
    assert [window[0] for window in windows[1:] if len(window) == 1] == [750, 500]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300).map(
        lambda gaps: [sum(gaps[: i + 1]) for i in range(len(gaps))]
    ),
    st.data(),
)
def test_any_run_gives_windows_of_its_checkpoints_or_a_reason(steps: list[int], data: st.DataObject) -> None:
    from_step = data.draw(st.sampled_from(steps))
    usable = [step for step in steps if 0.2 * from_step <= step <= from_step]
    if len(usable) < FEWEST_CHECKPOINTS:
        with pytest.raises(InputError, match=f"{len(usable)} checkpoints at the constant rate"):
            probe_windows(steps, from_step)
        return
    windows = probe_windows(steps, from_step)
    assert windows[0] == (from_step,)
    assert len(set(windows)) == len(windows)
    for window in windows:
        assert set(window) <= set(usable)
        assert list(window) == sorted(set(window))
        assert len(window) <= 40
    spans = {window[-1] - window[0] for window in windows if window[-1] == from_step} - {0}
    assert len(spans) >= 2
    assert len(windows) <= 50


def test_a_step_without_a_checkpoint_is_named() -> None:
    with pytest.raises(
        InputError, match=r"starts at step 990, of which there is no checkpoint.*steps 25, 50, …"
    ):
        probe_windows(range(25, 1001, 25), 990)
