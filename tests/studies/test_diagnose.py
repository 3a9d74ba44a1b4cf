"""The diagnose study: how predictions are judged, that none sees its own group, and verdicts from numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pma.diagnosis.evidence import Evidence
from pma.diagnosis.prediction import Constants, predict
from pma.studies import diagnose, diagnose_judging
from pma.studies.diagnose_judging import DIAGNOSIS, GROUPINGS, RATE_AND_STAGE, auroc, regrets
from pma.studies.presets import preset
from pma.studies.telling import Verdict

TRUTH = Constants(
    scale=-1.8,
    power=0.6,
    rate_power=0.6,
    spread_steps=7,
    drift=1,
    bend=0.5,
    settled=0.2,
    error=0.01,
    error_of_cost=0.1,
)
RESULT = Path(__file__).parents[2] / "docs" / "studies" / "diagnose" / "result.json"


def made_up_rows() -> list[dict[str, Any]]:
    """Eight runs, four places each, two windows at each: what the truth predicts, and a little noise."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(8):
        size, architecture, rate = (
            "abab"[number % 4],
            ("dense", "mixture")[number // 4],
            (1e-3, 4e-3)[number % 2],
        )
        for stage in range(4):
            for last in (3, 10):
                found = Evidence(
                    count=last,
                    noisy_step=0.03 * (rate / 1e-3) ** 0.7,
                    weights=30.0,
                    spread=float(random.uniform(2, 40)) * 1e-3,
                    gradient=float(random.uniform(0.5, 2)),
                    rate_share=1.0,
                    fall=0.02 * last / (stage + 1) * float(random.uniform(0.5, 1.5)),
                    bend=0.001,
                )
                gain = predict(found, TRUTH).gain + 0.003 * float(random.standard_normal())
                rows.append(
                    {
                        "place": 4 * number + stage,
                        "run": str(number),
                        "size": size,
                        "architecture": architecture,
                        "rate": rate,
                        "stage": diagnose.CONSTANT,
                        "step": 500 * (stage + 1),
                        "last": last,
                        "every": 25,
                        "gain": gain,
                        "error": 0.003,
                        "evidence": asdict(found),
                    }
                )
    return rows


@cache
def results() -> dict[str, Any]:
    rows = made_up_rows()
    return {"loss_characters": 100, "tokens_a_step": 8, "rows": rows, **diagnose_judging.judged(rows)}


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    random = np.random.default_rng(1)
    values, better = random.integers(0, 9, 40).astype(float), random.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[better] for b in values[~better]]
    assert auroc(values, better) == pytest.approx(np.mean(pairs))
    assert auroc(values, np.ones(40, bool)) is None


def test_regret_of_the_advice() -> None:
    rows = [{"place": p, "gain": g} for p, g in ((0, 0.1), (0, 0.3), (1, -0.1), (1, -0.2), (2, 0.2))]
    found = regrets(rows, np.array([0.5, 0.4, -0.1, 0.1, -0.3]))
    # the second best of two; a bad one where none was best; none where one was good
    assert found == {0: pytest.approx(0.2), 1: pytest.approx(0.2), 2: pytest.approx(0.2)}


def test_no_prediction_sees_its_own_group() -> None:
    rows = made_up_rows()

    def spy(train: Any, test: Any) -> Any:
        assert not (train & test).any()
        assert (train | test).all()
        for grouping in GROUPINGS:
            groups = {str(row[grouping]) for row, out in zip(rows, test, strict=True) if out}
            if len(groups) == 1 and grouping == asked:
                assert not groups & {str(row[asked]) for row, used in zip(rows, train, strict=True) if used}
        return np.zeros(test.sum())

    for asked in GROUPINGS:
        assert np.isfinite(diagnose_judging._left_out(rows, asked, spy)).all()


def test_a_truth_of_that_form_is_found() -> None:
    figures = results()["figures"]
    for grouping in GROUPINGS:
        found = figures[grouping][DIAGNOSIS]
        assert found["auroc"]["value"] > 0.95
        assert found["mean_absolute_error"] < 0.01
        assert found["regret_median"] <= 0.01
        assert figures[grouping][RATE_AND_STAGE]["auroc"]["value"] < found["auroc"]["value"]


def test_verdicts_follow_the_numbers() -> None:
    told = diagnose.tell(results())
    assert [f.verdict for f in told.findings][:2] == [Verdict.AGREES, Verdict.AGREES]
    changed = json.loads(json.dumps(results()))
    for grouping in GROUPINGS:
        worse = changed["figures"][grouping]
        worse[DIAGNOSIS]["auroc"] = {"value": 0.7, "low": 0.6, "high": 0.8}
        worse[DIAGNOSIS]["regret_median"] = 0.05
        worse[RATE_AND_STAGE]["auroc_lead"] = {"value": 0.0, "low": None, "high": None}
    changed["negatives"] = 0.1
    verdicts = [f.verdict for f in diagnose.tell(changed).findings]
    assert (verdicts[0], verdicts[1]) == (Verdict.DISAGREES, Verdict.CANNOT_TELL)
    assert verdicts[3:] == [Verdict.DISAGREES, Verdict.DISAGREES]
    diagnose.draw(results()).to_dict()


def test_windows_stay_within_one_phase() -> None:
    for name in ("cpu", "toy", "gpu"):
        sizes = preset(name)
        warmup, every = sizes.sizes[0].recipe.optimizer.warmup_steps, sizes.every_steps
        found = list(diagnose._there(diagnose._ENDS, 0, sizes.steps, warmup, sizes))
        assert found
        for at, windows in found:
            assert at <= sizes.steps
            assert all(at - (n - 1) * v * every > warmup for n, v in windows)


@pytest.mark.skipif(not RESULT.is_file(), reason="not run yet")
def test_the_calibration_that_comes_along_is_the_studys() -> None:
    """Of all its runs, to the digits that are kept."""
    kept = json.loads(files("pma.diagnosis").joinpath("calibrations", "nano.json").read_text())
    result = json.loads(RESULT.read_text())
    assert {key: kept[key] for key in ("with_gradient", "without_gradient")} == result["results"]["constants"]
    assert kept["windows"] == len(result["results"]["rows"])
