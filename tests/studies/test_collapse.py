"""What counts as a collapse and as passing its place, and what is told of it."""

from typing import Any

import numpy as np
import pytest

from pma.studies.catalogue import study
from pma.studies.collapse import best, collapse_step, first_worse
from pma.studies.passing import DATA, STARTS, findings, share, sign_test, summary, tables
from pma.studies.telling import Verdict


def curve(*parts: tuple[int, float]) -> tuple[Any, Any]:
    """Steps from 1 on, and levels, each for so many steps."""
    losses = np.concatenate([np.full(count, level) for count, level in parts])
    return np.arange(1, len(losses) + 1), losses


def test_best_is_the_lowest_mean_of_twenty_steps() -> None:
    assert best(*curve((30, 5.0), (20, 4.0), (50, 4.5))) == (50, pytest.approx(4.0))


def test_a_run_collapses_a_nat_above_its_best() -> None:
    assert collapse_step(*curve((30, 5.0), (30, 4.0), (10, 4.9))) == (None, pytest.approx(5.0))
    assert collapse_step(*curve((30, 5.0), (30, 4.0), (10, 4.9), (5, 5.1))) == (71, pytest.approx(5.0))


def test_high_losses_before_the_best_are_no_collapse() -> None:
    step, _ = collapse_step(*curve((30, 9.0), (30, 4.0), (10, 4.0)))
    assert step is None


def test_what_is_no_number_is_a_collapse() -> None:
    steps, losses = curve((40, 4.0), (5, 4.1))
    losses[42] = np.nan
    assert first_worse(steps, losses, 5.0, after=40) == 43
    assert first_worse(steps, losses, 5.0, after=43) is None


def test_sign_test_and_share_agree_with_closed_forms() -> None:
    assert sign_test(3, 3) == pytest.approx(2 * 0.5**3)
    assert sign_test(4, 5) == pytest.approx(2 * (5 + 1) * 0.5**5)
    assert sign_test(0, 0) == 1
    low, high = share(3, 3)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 3)), 1)
    assert share(0, 0) == (0, 1)


def arm(*, passed: bool, held: int, tail: float | None) -> dict[str, Any]:
    return {"passed": passed, "held_steps_past_the_collapse": held, "tail": tail, "held_out": tail}


def row(seed: int, merge: dict[str, Any], rollback: dict[str, Any]) -> dict[str, Any]:
    by_start = dict(zip(STARTS, (merge, rollback, rollback), strict=True))
    arms = {f"{start}, {data}": by_start[start] for start in STARTS for data in DATA}
    return {"seed": seed, "collapse_step": 100, "found": {"seen_step": 98}, "best": 4.0, "arms": arms}


def test_merge_and_rollback_are_paired_by_seed() -> None:
    better, worse = arm(passed=True, held=75, tail=4.5), arm(passed=False, held=5, tail=6.0)
    rows = [row(seed, better, worse) for seed in range(8)] + [row(8, worse, better)]
    told = summary(rows)["same data"]
    assert told["passed"] == {"merge": 8, "rollback": 1, "further rollback": 1}
    pair = told["merge less rollback"]
    assert (pair["passed_by_merge_only"], pair["passed_by_other_only"]) == (8, 1)
    assert pair["held_steps_past_the_collapse"]["value"] == pytest.approx((8 * 70 - 70) / 9)
    assert pair["tail"]["median"] == -1.5
    assert told["above_best"]["by_seed"] == (0.5,) * 8
    verdicts = {finding.claim: finding.verdict for finding in findings({"summary": summary(rows)})}
    assert (
        verdicts["where just one of merge and rollback passes, it is the merge (same data)"] is Verdict.AGREES
    )
    returned = "merges that passed return to within 0.1 nats of the run's best loss (same data)"
    assert verdicts[returned] is Verdict.DISAGREES


def test_models_that_are_no_numbers_are_left_out_of_means() -> None:
    rows = [
        row(0, arm(passed=True, held=75, tail=None), arm(passed=False, held=5, tail=6.0)),
        row(1, arm(passed=True, held=75, tail=4.0), arm(passed=False, held=5, tail=6.0)),
        row(2, arm(passed=True, held=75, tail=4.2), arm(passed=False, held=5, tail=6.0)),
    ]
    pair = summary(rows)["data skipped"]["merge less rollback"]
    assert pair["tail"]["by_seed"] == (-2.0, pytest.approx(-1.8))


def test_no_collapse_is_a_result() -> None:
    told = summary([{"seed": 10, "collapse_step": None}])
    (finding,) = findings({"summary": told})
    assert finding.verdict is Verdict.CANNOT_TELL
    assert finding.evidence == "Of 1 runs none collapsed."
    assert tables(told)


def test_the_seeds_are_not_those_the_setting_was_found_with() -> None:
    assert study("fig7").seeds_of(None) == tuple(range(10, 22))
    assert study("fig7").seeds_of(2) == (10, 11)
    assert study("fig1").seeds_of(None) == (0, 1, 2)
