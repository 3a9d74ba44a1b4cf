"""The study of forecasts: its words against plain sums, and the calibration that the package keeps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pma.forecast.calibration import DEFAULT, Calibration, named
from pma.studies.forecast_telling import GROUP, coverage, tell

RESULT = Path(__file__).parents[2] / "docs" / "studies" / "forecast" / "result.json"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(RESULT.read_text())["results"]
    return made


def test_the_kept_calibration_is_the_studys(results: dict[str, Any]) -> None:
    assert named(DEFAULT) == Calibration.from_json(results["calibration"])


def test_the_table_says_what_the_cases_say(results: dict[str, Any]) -> None:
    told = tell(results)
    rows = {row[0]: row for row in told.tables[0].rows}
    cases, merges = results["cases"], results["merges"][GROUP]
    own = np.array([abs(row["loss"] - case["loss"]) for row, case in zip(merges, cases, strict=True)])
    assert rows[f"**merges**, {GROUP} left out"][2].startswith(f"{own.mean():.4f} (")
    for name, losses in results["rules"].items():
        errors = np.array([abs(loss - case["loss"]) for loss, case in zip(losses, cases, strict=True)])
        assert rows[name][2].startswith(f"{errors.mean():.4f} (")
        assert rows[name][4].startswith(f"{own.mean() / errors.mean():.2f} (")


def test_simple_rules_know_no_decay_of_the_run(results: dict[str, Any]) -> None:
    """The mean gain of the other runs, over decays of the same length, by hand."""
    cases, last = results["cases"], results["rules"]["last loss"]
    for i in (0, 57, 159):
        others = [
            (j, case)
            for j, case in enumerate(cases)
            if case["run"] != cases[i]["run"] and case["steps"] == cases[i]["steps"]
        ]
        gain = np.mean([last[j] - case["loss"] for j, case in others])
        assert results["rules"]["last − mean gain of other runs"][i] == pytest.approx(last[i] - gain)


def test_coverage_counts() -> None:
    cases = [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]
    rows = [{"interval80": [0.9, 1.1]}, {"interval80": [2.1, 2.2]}, None]
    np.testing.assert_array_equal(coverage(cases, rows, 0.80), [1.0, 0.0, np.nan])


def test_a_study_in_which_nothing_could_be_forecast_says_so() -> None:
    empty = {
        "anneal_steps": 4,
        "probe_steps": 2,
        "every_steps": 2,
        "cases": [],
        "refused": ["run at step 8: no merge is better"],
        "rules": {},
        "merges": {GROUP: []},
        "own": {"a short probe": []},
        "shapes": {"cases": [], "merges": []},
        "calibration": None,
    }
    told = tell(empty)
    assert told.verdict == "cannot tell at this size"
    assert told.notes == [
        "Not forecast, as merges do not tell: 1; such as run at step 8: no merge is better."
    ]
