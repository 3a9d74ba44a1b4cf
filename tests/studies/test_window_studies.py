"""Figures 2 to 5 and the learning rates: verdicts follow the numbers, whichever way these fall; windows that
are not there are said.
"""

from __future__ import annotations

from typing import Any

import pytest

from pma.studies import fig2, fig3, fig4, fig5, lr
from pma.studies.presets import preset
from pma.studies.telling import Told, Verdict

from .made_up import case

A, D, C = Verdict.AGREES, Verdict.DISAGREES, Verdict.CANNOT_TELL


def verdicts(told: Told) -> list[Verdict]:
    """Of each finding."""
    return [finding.verdict for finding in told.findings]


def fork(first_merge: float, end_merge: float) -> dict[str, Any]:
    """Annealing gains 0.1 over raw at the end."""
    cases = {
        0: case({"raw": 3.0, "merged": 2.9, "annealed": 3.0}),
        25: case({"raw": 2.99, "merged": first_merge, "annealed": 2.95}),
        100: case({"raw": 2.98, "merged": end_merge, "annealed": 2.88}),
    }
    scored = case({"raw": 2.98, "merged": end_merge, "annealed": 2.88}, cloze=True)
    parts = fig3._of_fork(cases, scored)
    common = {"loss_characters": 100, "last": 10, "every_steps": 25, "anneal_steps": 100, "tokens_a_step": 8}
    return {**common, "forks": [{"size": "a", "fork_step": 500, **parts}]}


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(2.90, 2.88, [A, A, A, A]), (2.97, 2.93, [A, D, D, A]), (3.1, 2.89, [D, D, C, A])],
)
def test_forks(first: float, end: float, expected: list[Verdict]) -> None:
    results = fork(first, end)
    assert verdicts(fig3.tell(results)) == expected
    fig3.draw(results).to_dict()
    shares = results["forks"][0]["recovered"]
    assert shares["merged at the fork"]["value"] == pytest.approx(0.1 / 0.12, abs=0.02)
    assert shares["merged"]["value"] == pytest.approx((3 - end) / 0.12, abs=0.02)


@pytest.mark.parametrize(
    ("early", "end", "expected"), [(2.80, 2.80, [A, A]), (2.87, 2.75, [D, D]), (2.80, 2.85, [A, A])]
)
def test_decays(early: float, end: float, expected: list[Verdict]) -> None:
    """The decay gains 0.2; a merge at its start gains 0.1."""
    windows = {"merge of 10": 10}
    cases = {
        0: case({"raw": 3.0, "merge of 10": 2.9}),
        25: case({"raw": 2.98, "merge of 10": early}),
        100: case({"raw": 2.8, "merge of 10": end}),
    }
    results = {
        "loss_characters": 100,
        "windows": windows,
        "every_steps": 25,
        "decay_start_step": 500,
        "decay_steps": 100,
        "tokens_a_step": 8,
        "sizes": [{"size": "a", "points": fig2._of_size(cases, windows)}],
    }
    assert verdicts(fig2.tell(results)) == expected
    fig2.draw(results).to_dict()


def of_schemes(**changed: float) -> dict[str, Any]:
    """A stage: sma gains 0.1 and the others as much, but for those `changed`."""
    losses = {"raw": 3.0, **dict.fromkeys(fig4.SCHEMES, 2.9), **changed}
    return fig4._of_stage(case(losses))


def test_schemes() -> None:
    early = of_schemes(wma=2.85, **{"ema:0.2": 2.89, "ema:0.1": 2.95})
    late = of_schemes(**{"ema:0.1": 2.905})
    scored = case({"raw": 3.0, "sma": 2.9, "wma": 2.9}, cloze=True)
    results: dict[str, Any] = {
        "loss_characters": 100,
        "last": 10,
        "every_steps": 25,
        "tokens_a_step": 8,
        "scores": [{"size": "a", "step": 100, **fig4._scored(scored)}],
        "stages": [
            {"size": "a", "stage": stage, "step": 100, **values}
            for stage, values in (("early", early), ("late", late))
        ],
    }
    assert verdicts(fig4.tell(results)) == [A, A, A, A]
    fig4.draw(results).to_dict()
    results["stages"] = [
        {**s, "stage": "late" if s["stage"] == "early" else "early"} for s in results["stages"]
    ]
    told = fig4.tell(results)
    assert told.findings[1].verdict is not A
    assert told.findings[3].verdict is D


def test_windows_that_reach_into_the_warmup_are_not_there() -> None:
    cpu = preset("cpu")
    assert fig5.Shape(every=100, last=10).exists(1_000, cpu)  # the first is at 100, where the warmup ends
    assert not fig5.Shape(every=125, last=8).exists(950, cpu)
    assert not fig5.Shape(every=200, last=10).exists(1_000, cpu)


def of_windows(large_v: float, many: float) -> dict[str, Any]:
    """A stage: windows gain 0.1, but for that of the largest V and that of the largest N."""
    shapes = fig5.ablations(preset("cpu"))
    names = {shape.name for varied in shapes.values() for shape in varied}
    losses = {"raw": 3.0, **dict.fromkeys(sorted(names), 2.9), "N=10 V=200": large_v, "N=15 V=25": many}
    return fig5._of_stage(case(losses), shapes)


def of_intervals_and_numbers(early: dict[str, Any], late: dict[str, Any]) -> dict[str, Any]:
    models = {"raw": 3.0, "N=10 V=25": 2.9, "N=10 V=50": 2.8, "N=3 V=25": 2.85}
    best = fig5._best(case(models), case({name: loss + 0.1 for name, loss in models.items()}), "N=10 V=25")
    return {
        "loss_characters": 100,
        "tokens_a_step": 8,
        "ablations": {
            varied: [{"name": s.name, "every": s.every, "last": s.last} for s in shapes]
            for varied, shapes in fig5.ablations(preset("cpu")).items()
        },
        "stages": [
            {"size": "a", "stage": "early", "step": 1_000, **early},
            {"size": "a", "stage": "late", "step": 3_000, **late},
        ],
        "best": [{"size": "a", **best}],
    }


def test_intervals_and_numbers() -> None:
    paper = of_intervals_and_numbers(of_windows(3.1, 2.95), of_windows(2.9, 2.85))
    assert verdicts(fig5.tell(paper)) == [A, A, A, A]
    fig5.draw(paper).to_dict()
    otherwise = of_intervals_and_numbers(of_windows(2.9, 2.85), of_windows(3.1, 2.95))
    assert verdicts(fig5.tell(otherwise)) == [D, D, D, D]
    assert paper["best"][0]["window"] == "N=10 V=50"
    assert paper["best"][0]["over_usual"]["value"] == pytest.approx(0.1, abs=0.01)


def test_a_window_that_is_not_there_is_said() -> None:
    early = of_windows(3.1, 2.9)
    del early["gain"]["N=10 V=200"]
    told = fig5.tell(of_intervals_and_numbers(early, of_windows(2.9, 2.9)))
    assert told.tables[0].rows[0][-1] == "no such window"
    assert verdicts(told)[0] is D  # the next largest V gains


def of_rates(merged_best: float) -> dict[str, Any]:
    """Parabolas in log2 of rate ÷ 4e-3: raw best at 2e-3, annealed at 4e-3, merged at that power of two."""
    steps = {1e-3: -2.0, 2e-3: -1.0, 4e-3: 0.0, 8e-3: 1.0, 1.6e-2: 2.0}
    losses = {
        rate: {
            "raw": 3.0 + 0.05 * (x + 1) ** 2,
            "merged": 2.9 + 0.01 * (x - merged_best) ** 2,
            "annealed": 2.85 + 0.01 * x**2,
        }
        for rate, x in steps.items()
    }
    every = case({f"{kind} {rate:g}": each[kind] for rate, each in losses.items() for kind in lr.KINDS})
    cases = {
        rate: fig3.Case(readings={kind: every.readings[f"{kind} {rate:g}"] for kind in lr.KINDS})
        for rate in steps
    }
    validation = {
        rate: {
            "raw": each["raw"],
            "annealed": each["annealed"],
            "N=10 V=25": each["merged"],
            "N=10 V=50": 9.0,
        }
        for rate, each in losses.items()
    }
    size = {"size": "a", "tuned": 4e-3, **lr._of_size(cases, validation)}
    return {"loss_characters": 100, "windows": ["N=10 V=25", "N=10 V=50"], "sizes": [size]}


def test_rates() -> None:
    results = of_rates(1.0)
    size = results["sizes"][0]
    assert size["chosen"] == {"raw": 2e-3, "merged": 8e-3, "annealed": 4e-3}
    assert size["ratio"]["annealed"]["rate"] == pytest.approx(2.0, rel=0.05)
    assert verdicts(lr.tell(results))[::2] == [A, D]
    lr.draw(results).to_dict()
    assert verdicts(lr.tell(of_rates(-1.0)))[0] is D
