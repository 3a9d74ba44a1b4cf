"""Calibrations of toys whose decays are known exactly, with an error put in that must be found again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pma.averaging.decay import DECAYS
from pma.errors import FormatError, InputError, UsageError
from pma.forecast.calibration import (
    DEFAULT,
    Calibration,
    Case,
    Decay,
    calibrate,
    components,
    named,
    names,
    promise,
)
from pma.forecast.outlook import outlook
from pma.forecast.probes import Probe, spread_of

from .toy import Toy, power_law_toy

TOYS = {
    "plain": power_law_toy(),
    "sharp": power_law_toy(slope=0.9),
    "flat": power_law_toy(slope=0.5),
    "low rate": power_law_toy(rate=0.15),
}
FORKS, LENGTHS = (8_000, 16_000), (1_000, 3_000)
NONE = Calibration(
    name="none",
    what="",
    alpha=0.5,
    offset=0.0,
    slope=0.0,
    of_run=0.03,
    of_fork=0.02,
    of_decay=0.04,
    freedom=5,
    probe_error=0.0,
    moved=(0.01, 0.5),
    runs=1,
    cases=1,
)


def probes(toy: Toy, end: int) -> tuple[Probe, ...]:
    made = []
    for window in (100, 300, 1000, 3000):
        for at in (end - 2000, end):
            steps = tuple(np.linspace(at - window, at, 10).astype(int).tolist())
            loss = toy.merged(list(steps), np.full(10, 0.1))
            made.append(Probe(steps=steps, weights=(0.1,) * 10, loss=loss))
    raw = range(end // 4, end + 1, end // 8)
    return (*made, *(Probe(steps=(step,), weights=(1.0,), loss=toy.raw(step)) for step in raw))


def cases(short: Callable[[str, int, int, float], float]) -> list[Case]:
    """Every decay of every toy; `short`: by how much of its gain the loss is below what is promised."""
    made = []
    for name, toy in TOYS.items():
        for fork in FORKS:
            told = probes(toy, fork)
            for steps in LENGTHS:
                shares = Decay(shape="cosine", steps=steps).shares
                said = promise(spread_of(told, fork, alphas=(0.5,), draws=0), shares)
                loss = said.loss - said.gain * short(name, fork, steps, said.moved)
                made.append(
                    Case(run=name, group=name, from_step=fork, probes=told, shares_T=shares, loss=loss)
                )
    return made


def test_a_decay_falls_as_its_shape_says() -> None:
    np.testing.assert_allclose(Decay(shape="linear", steps=4).shares, [0.75, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(Decay(shape="linear", steps=2, floor=0.5).shares, [0.75, 0.5])
    for shape in DECAYS:
        assert (np.diff(Decay(shape=shape, steps=50).shares) < 0).all()
    for wrong in ({"shape": "cubic", "steps": 3}, {"shape": "linear", "steps": 0}):
        with pytest.raises(UsageError):
            Decay(**wrong)  # type: ignore[arg-type]


def test_constants_that_were_put_in_are_found_again() -> None:
    learned = calibrate(
        cases(lambda run, fork, steps, moved: 0.3 + 0.1 * np.log(moved)), name="x", what="toys"
    )
    assert learned.alpha == pytest.approx(0.5, abs=0.06)
    assert learned.offset == pytest.approx(0.3, abs=0.03)
    assert learned.slope == pytest.approx(0.1, abs=0.01)
    assert (learned.runs, learned.cases, learned.freedom) == (4, 16, 3)
    assert max(learned.of_run, learned.of_fork, learned.of_decay) < 0.01


def test_errors_are_told_apart() -> None:
    """What all decays of a run share, what those of one fork share, and the rest."""
    random, made, left = np.random.default_rng(0), [], []
    for run in range(300):
        of_run = 0.05 * random.standard_normal()
        for fork in (100, 200, 300):
            of_fork = 0.03 * random.standard_normal()
            for _ in range(2):
                shares = np.ones(1)
                made.append(
                    Case(run=str(run), group="x", from_step=fork, probes=(), shares_T=shares, loss=0.0)
                )
                left.append(of_run + of_fork + 0.04 * random.standard_normal())
    assert components(made, np.array(left)) == pytest.approx((0.05, 0.03, 0.04), abs=0.006)
    # no part is negative, whatever chance has them be, and together they are all of it
    alternating = np.array([(-1.0) ** i for i in range(len(made))])
    assert components(made, alternating) == pytest.approx((0.0, 0.0, 1.0))


def test_one_group_is_no_calibration() -> None:
    one = [case for case in cases(lambda *_: 0.0) if case.group == "plain"]
    with pytest.raises(
        InputError, match=r"4 known decays of 1 group\(s\) of runs; a calibration needs at least 2"
    ):
        calibrate(one, name="x", what="")


def test_decays_of_the_run_itself_move_the_forecast() -> None:
    """By the regression on them: the shares of what is common to both."""
    toy, decay = TOYS["plain"], Decay(shape="cosine", steps=3_000)
    told = probes(toy, 16_000)
    alone = outlook(told, 16_000, decay, NONE)
    assert alone.loss == pytest.approx(toy.annealed(16_000, decay.shares), abs=2e-3)
    run, fork, own = (x**2 for x in (NONE.of_run, NONE.of_fork, NONE.of_decay))
    for at, shared in ((16_000, run + fork), (8_000, run)):
        other = Decay(shape="cosine", steps=1_000)
        before = probes(toy, at)
        said = promise(spread_of(before, at, alphas=(0.5,), draws=0), other.shares)
        case = Case(
            run="x",
            group="x",
            from_step=at,
            probes=before,
            shares_T=other.shares,
            loss=said.loss - 0.1 * said.gain,
        )
        known = outlook(told, 16_000, decay, NONE, [case])
        expected = -0.1 * shared / (run + fork + own) * alone.promise.gain
        assert known.moved_by == pytest.approx(expected, rel=1e-6)
        assert known.loss - alone.loss == pytest.approx(expected, rel=1e-6)
        left = run + fork + own - shared**2 / (run + fork + own)
        assert known.error / alone.error == pytest.approx(np.sqrt(left / (run + fork + own)), rel=0.05)


def test_what_goes_beyond_is_widened_and_said() -> None:
    told = probes(TOYS["plain"], 16_000)
    near = outlook(told, 16_000, Decay(shape="cosine", steps=2_500), NONE)
    far = outlook(told, 16_000, Decay(shape="cosine", steps=12_000), replace(NONE, moved=(0.01, 0.1)))
    assert near.widened == ()
    assert [why.split(" the ")[0] for why, _ in far.widened] == ["it moves", "it is 4 times as long as"]
    assert far.error > 3 * near.error
    assert all(factor == pytest.approx(np.sqrt(4), rel=0.06) for _, factor in far.widened)


def test_what_merges_do_not_tell_is_not_told() -> None:
    unsure = replace(NONE, of_run=1.0)
    made = outlook(probes(TOYS["plain"], 16_000), 16_000, Decay(shape="cosine", steps=2_500), unsure)
    assert not made.told


def test_kept_calibrations() -> None:
    assert DEFAULT in names()
    kept = named(DEFAULT)
    assert Calibration.from_json(json.loads(json.dumps(kept.to_json()))) == kept
    with pytest.raises(UsageError, match="no such file, and of those that are kept there is nano"):
        named("nowhere")
    with pytest.raises(UsageError, match="no such file"):
        named("../calibrations/nano")


@pytest.mark.parametrize(
    "change",
    [{"version": 9}, {"alpha": "x"}, {"of_run": -1}, {"slope": float("nan")}, {"freedom": 0}, {"moved": [1]}],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**NONE.to_json(), **change}))
    with pytest.raises(FormatError, match=r"own\.json is no calibration"):
        named(str(path))
    path.write_text(json.dumps(NONE.to_json()))
    assert named(str(path)) == NONE
