"""Mechanism, figure 8 and routing on losses and loads that are known: what is predicted is what is measured,
and verdicts follow the numbers, whichever way these fall.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pma.analysis.curvature import Surface
from pma.analysis.parameters import Layout
from pma.analysis.planes import Grid
from pma.analysis.routing import Routing
from pma.studies import fig8, mechanism, router
from pma.studies.mechanism import Space
from pma.studies.presets import preset
from pma.studies.telling import Told, Verdict

A, D, C = Verdict.AGREES, Verdict.DISAGREES, Verdict.CANNOT_TELL
TOY = preset("toy")
PARAMETERS, BATCHES = 5, 4


def bowl(curvature: float) -> Surface:
    """L_b = ½ c_b ‖θ‖² with c_b about `curvature`, so that the optimum is 0."""

    def loss(b: int) -> Any:
        return lambda named: 0.5 * curvature * (1 + b / 100) * (named["a"] ** 2).sum()

    return Surface(
        layout=Layout(shapes={"a": (PARAMETERS,)}),
        batch_losses=[loss(b) for b in range(BATCHES)],
        share_B=np.full(BATCHES, 1 / BATCHES),
        dtype=torch.float64,
    )


def space(curvature: float, drift: float) -> Space:
    """Checkpoints that jump about a point, which travels towards the optimum at 0 by `drift` a step."""

    def checkpoint(step: int) -> np.ndarray:
        around = np.random.default_rng(step).standard_normal(PARAMETERS)
        return around + drift * (TOY.steps - step) * np.ones(PARAMETERS)

    surface = bowl(curvature)
    return Space(checkpoint=checkpoint, predict=surface, measure=surface, spectrum=surface)


def of_mechanism(curvature: float, drift: float) -> dict[str, Any]:
    here = space(curvature, drift)
    windows = [row for end in mechanism.window_ends(TOY) for row in mechanism._windows(here, TOY, end)]
    optimum = np.zeros(PARAMETERS)
    matrices = [
        {"step": TOY.steps, "around": "annealed", **mechanism._matrix(here, TOY, TOY.steps, optimum)},
        {"step": TOY.steps, "around": "merge", **mechanism._matrix(here, TOY, TOY.steps, None)},
    ]
    spectrum = {"largest": [1.0], "smallest": [-1.0], "half_upward": 0.1, "half_downward": -0.1}
    model = {"size": "a", "windows": windows, "telling": mechanism._telling(windows)}
    tokens = dict.fromkeys(("predict_tokens", "measure_tokens", "spectrum_tokens"), 8)
    return {
        "last": 3,
        "every_steps": 2,
        "lanczos_steps": 4,
        **tokens,
        "models": [{**model, "matrices": matrices, "spectrum": spectrum}],
    }


def verdicts(told: Told) -> list[Verdict]:
    return [finding.verdict for finding in told.findings]


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_on_a_quadratic_loss_what_is_predicted_is_what_is_measured(drift: float) -> None:
    results = of_mechanism(2.0, drift)
    model = results["models"][0]
    for row in model["windows"]:
        assert row["predicted"] == pytest.approx(row["measured"])
    for matrix in model["matrices"]:
        assert matrix["gap_predicted"] == pytest.approx(matrix["gap_measured"])
        # a quadratic loss has one gap, about whichever point it is expanded
        assert matrix["inequality"]["value"] / 2 / 3**2 == pytest.approx(matrix["gap_measured"]["value"])
    about_merge = np.array(model["matrices"][1]["matrix"])
    np.testing.assert_allclose(about_merge.sum(axis=0), 0, atol=1e-4)
    assert verdicts(mechanism.tell(results))[:2] == [A, A]
    assert verdicts(mechanism.tell(results))[3:] == [A, A]
    mechanism.draw(results).to_dict()


def test_on_a_hill_the_papers_inequality_fails() -> None:
    assert verdicts(mechanism.tell(of_mechanism(-2.0, 0.0)))[:2] == [D, D]


def test_deviations_that_travel_together_do_not_complement_each_other() -> None:
    assert verdicts(mechanism.tell(of_mechanism(2.0, 5.0)))[2] is D


def planes_of(lowest: tuple[float, float], chance: float) -> dict[str, Any] | None:
    """Three checkpoints about the merge; each batch has its minimum near `lowest`."""
    x = y = np.linspace(-3, 3, 13)
    draw = np.random.default_rng(0)
    losses = [
        (x - lowest[0] - a) ** 2 + (y[:, None] - lowest[1] - b) ** 2
        for a, b in chance * draw.normal(size=(8, 2))
    ]
    at = np.array([[-1.0, -1.0], [1.0, -1.0], [0.0, 2.0]])
    return fig8._nearer(Grid(x_X=x, y_Y=y, losses_GYX=np.array(losses)), at, np.full(8, 1 / 8))


def test_distances_to_the_minimum() -> None:
    centre, near_one = planes_of((0.1, 0.0), 0.05), planes_of((0.9, -0.9), 0.05)
    assert centre is not None
    assert near_one is not None
    assert centre["merge"]["value"] == pytest.approx(0.1, abs=0.05)
    assert centre["than_nearest"]["low"] > 0
    assert near_one["than_nearest"]["high"] < 0
    assert near_one["nearest"]["value"] == pytest.approx(np.hypot(0.1, 0.1), abs=0.05)
    assert planes_of((9.0, 0.0), 0.05) is None


@pytest.mark.parametrize(
    ("gain", "lowest", "expected"),
    [(0.1, (0.1, 0.0), [A, A, A]), (-0.1, (0.9, -0.9), [D, D, D]), (0.0, (9.0, 0.0), [C, C, C])],
)
def test_figure_8(gain: float, lowest: tuple[float, float], expected: list[Verdict]) -> None:
    told = {"value": gain, "low": gain - 0.01, "high": gain + 0.01}
    x = np.linspace(-3, 3, 7)
    plane = {
        "x": x.tolist(),
        "y": x.tolist(),
        "loss": (x**2 + x[:, None] ** 2).tolist(),
        "steps": [1, 2, 3],
        "checkpoints": [[-1, -1], [1, -1], [0, 2]],
        "annealed": [0.1, 0.2],
        "annealed_distance": 3.0,
        "minimum": None if lowest[0] > 3 else list(lowest),
        "nearer": planes_of(lowest, 0.05),
        "merge_loss": told,
        "gain_over": [told] * 3,
        "annealed_over_merge": told,
    }
    common = {"last": 3, "every_steps": 2, "grid_tokens": 8, "measure_tokens": 8}
    results = {**common, "models": [{"size": "a", "three": plane, "principal": plane}]}
    assert verdicts(fig8.tell(results)) == expected
    fig8.draw(results).to_dict()


def routed(chance: list[float], seed: int) -> Routing:
    """A layer of four experts; 40 documents of 50 tokens, an expert a token."""
    draw = np.random.default_rng(seed)
    chosen = draw.choice(4, size=(1, 2000, 1), p=chance)
    return Routing(chosen_LTK=chosen, experts=4, document_T=np.arange(2000) // 50)


def of_router(last: Routing, merge: Routing, more: float) -> dict[str, Any]:
    difference = {"value": more, "low": more - 0.01, "high": more + 0.01}
    balance = {
        name: router._means(router.routing.balance(r.load()))
        for name, r in (("last", last), ("merge", merge))
    }
    point = {
        "step": 8,
        "gain": difference,
        "agreement": {"last merge": {**difference, "value": 0.9}},
        "more_than": dict.fromkeys(("neighbour", "earlier", "annealed"), difference),
        "balance": balance,
        "change": router._change(last, merge),
    }
    common = {"last": 3, "every_steps": 2, "tokens": 8, "tokens_a_step": 4, "experts": 4, "top": 1}
    return {**common, "models": [{"size": "a", "points": [point]}]}


def test_routing() -> None:
    even, skewed = [0.25] * 4, [0.7, 0.1, 0.1, 0.1]
    same = routed(even, 0)
    assert verdicts(router.tell(of_router(same, same, 0.1))) == [A, A, A, A, C]
    evened = of_router(routed(skewed, 0), routed(even, 1), -0.1)
    assert verdicts(router.tell(evened)) == [D, D, D, D, A]
    change = evened["models"][0]["points"][0]["change"]
    skew = np.array(skewed)
    expected = 1 + (skew * np.log(skew)).sum() / np.log(4)
    assert change["entropy"]["value"] == pytest.approx(expected, abs=0.03)
    assert change["entropy"]["low"] < expected < change["entropy"]["high"]
    assert change["heaviest"]["value"] == pytest.approx(0.25 / 0.7 - 1, abs=0.05)
    assert verdicts(router.tell(of_router(routed(even, 1), routed(skewed, 0), 0.0)))[3:] == [D, D]
    router.draw(evened).to_dict()
