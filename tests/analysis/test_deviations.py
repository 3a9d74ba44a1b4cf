"""Deviations and planes on a quadratic loss, where all of it is closed form."""

import numpy as np
import pytest
import torch

from pma.analysis.contours import contours
from pma.analysis.curvature import Surface
from pma.analysis.deviations import bending, principal_mixtures
from pma.analysis.parameters import Layout
from pma.errors import InputError

PARAMETERS, BATCHES = 12, 4
SHARE = np.array([0.1, 0.2, 0.3, 0.4])
STEPS = (10, 20, 30, 40)


class Bowl:
    """L_b = ½ (θ − θ*_b)ᵀ H_b (θ − θ*_b), with H_b positive definite unless `hollow`."""

    def __init__(self, *, hollow: bool = True) -> None:
        random = np.random.default_rng(4)
        raw = random.standard_normal((BATCHES, PARAMETERS, PARAMETERS))
        self.hessians = (raw @ raw.transpose(0, 2, 1) / PARAMETERS + np.eye(PARAMETERS)) * (
            1 if hollow else -1
        )
        self.optima = 0.1 * random.standard_normal((BATCHES, PARAMETERS))
        self.hessian = np.tensordot(SHARE, self.hessians, 1)
        self.optimum = np.linalg.solve(
            self.hessian, np.einsum("b,bij,bj->i", SHARE, self.hessians, self.optima)
        )
        self.points = random.standard_normal((4, PARAMETERS)) + 0.5
        self.merge = self.points.mean(axis=0)

    @property
    def surface(self) -> Surface:
        def loss(b: int):
            h, o = torch.tensor(self.hessians[b]), torch.tensor(self.optima[b])
            return lambda named: (named["a"] - o) @ h @ (named["a"] - o) / 2

        return Surface(
            layout=Layout(shapes={"a": (PARAMETERS,)}),
            batch_losses=[loss(b) for b in range(BATCHES)],
            share_B=SHARE,
            tokens=99,
            dtype=torch.float64,
        )

    def loss(self, theta: np.ndarray) -> float:
        away = theta - self.optima
        return float(SHARE @ np.einsum("bi,bij,bj->b", away, self.hessians, away) / 2)


def test_slopes_curvatures_and_gain_are_those_of_the_quadratic():
    bowl = Bowl()
    found = bending(bowl.surface, bowl.merge, bowl.points, steps=STEPS)
    gradient = bowl.hessian @ (bowl.merge - bowl.optimum)
    for step, point, deviation in zip(STEPS, bowl.points, found.deviations, strict=True):
        d = point - bowl.merge
        assert deviation.step == step
        assert deviation.distance == pytest.approx(np.linalg.norm(d))
        assert deviation.slope.value == pytest.approx(gradient @ d)
        assert deviation.half_curvature.value == pytest.approx(d @ bowl.hessian @ d / 2)
    gain = bowl.loss(bowl.points[-1]) - bowl.loss(bowl.merge)
    assert found.measured.value == pytest.approx(gain)
    assert found.predicted.value == pytest.approx(gain)
    assert (found.missed.value, found.missed.standard_error) == pytest.approx((0, 0), abs=1e-9)
    assert found.tokens == 99


def test_errors_are_over_batches():
    bowl = Bowl()
    found = bending(bowl.surface, bowl.merge, bowl.points, steps=STEPS)
    d = bowl.points[0] - bowl.merge
    slope_B = np.einsum("bij,bj,i->b", bowl.hessians, bowl.merge - bowl.optima, d)
    residual_B = (slope_B - SHARE @ slope_B) * SHARE / SHARE.mean()
    expected = residual_B.std(ddof=1) / np.sqrt(BATCHES)
    assert found.deviations[0].slope.standard_error == pytest.approx(expected)


def test_the_lowest_place_on_the_line_is_where_the_parabola_is_lowest():
    bowl = Bowl()
    found = bending(bowl.surface, bowl.merge, bowl.points, steps=STEPS)
    last, way = bowl.points[-1], bowl.merge - bowl.points[-1]
    exact = -(way @ bowl.hessian @ (last - bowl.optimum)) / (way @ bowl.hessian @ way)
    assert found.best_t == pytest.approx(exact)
    around = [bowl.loss(last + (exact + step) * way) for step in (-0.01, 0, 0.01)]
    assert min(around) == around[1]
    assert bending(Bowl(hollow=False).surface, bowl.merge, bowl.points, steps=STEPS).best_t is None


def test_principal_directions_are_singular_vectors_and_share_out_the_gain():
    bowl = Bowl()
    deviations = bowl.points - bowl.merge
    shares, mixtures = principal_mixtures(deviations)
    _, singular, directions = np.linalg.svd(deviations, full_matrices=False)
    np.testing.assert_allclose(np.abs(mixtures @ deviations @ directions[:3].T), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(shares, singular[:3] ** 2 / (singular**2).sum())
    found = bending(bowl.surface, bowl.merge, bowl.points, steps=STEPS)
    assert len(found.directions) == 3  # the deviations add up to nothing
    gradient = bowl.hessian @ (bowl.merge - bowl.optimum)
    for direction, u in zip(found.directions, mixtures @ deviations, strict=True):
        assert direction.last_coordinate == pytest.approx(u @ deviations[-1])
        assert direction.last_coordinate >= 0
        assert direction.slope.value == pytest.approx(gradient @ u)
        assert direction.curvature.value == pytest.approx(u @ bowl.hessian @ u)
    parts = sum(direction.part_of_gain.value for direction in found.directions)
    assert parts == pytest.approx(found.predicted.value)


@pytest.mark.parametrize("best", [1, 3])
def test_the_plane_holds_merge_last_and_the_best_checkpoint(best):
    bowl = Bowl()
    asked: list[int] = []
    found = contours(
        bowl.surface,
        bowl.merge,
        bowl.points,
        steps=STEPS,
        best=best,
        points_a_side=5,
        advance=asked.append,
    )
    assert asked == list(range(1, 26))
    last = found.checkpoints[-1]
    assert (last.x, last.y, last.distance) == pytest.approx(
        (np.linalg.norm(bowl.points[-1] - bowl.merge), 0, 0), abs=1e-9
    )
    x = (bowl.points[-1] - bowl.merge) / last.x
    if best == 1:
        other = bowl.points[1] - bowl.merge
        assert found.checkpoints[1].distance == pytest.approx(0, abs=1e-6)
        assert "step 20" in found.third
    else:
        _, mixtures = principal_mixtures(bowl.points - bowl.merge)
        other = mixtures[0] @ (bowl.points - bowl.merge)
        assert "principal direction" in found.third
    y = other - (other @ x) * x
    y /= np.linalg.norm(y)
    for row, at_y in enumerate(found.y):
        for column, at_x in enumerate(found.x):
            exact = bowl.loss(bowl.merge + at_x * x + at_y * y)
            assert found.loss[row][column] == pytest.approx(exact, rel=1e-6)
    # the minimum of the plane, by the normal equations in it
    axes = np.array([x, y])
    exact = np.linalg.solve(axes @ bowl.hessian @ axes.T, -axes @ bowl.hessian @ (bowl.merge - bowl.optimum))
    inside = all(low < at < high for at, (low, *_, high) in zip(exact, (found.x, found.y), strict=True))
    assert found.lowest == (pytest.approx(tuple(exact), rel=1e-4) if inside else None)
    for mark in found.checkpoints:
        assert found.x[0] < mark.x < found.x[-1]
        assert found.y[0] < mark.y < found.y[-1]


def test_two_checkpoints_span_no_plane():
    bowl = Bowl()
    two = bowl.points[:2]
    with pytest.raises(InputError, match="lie on a line: no plane"):
        contours(bowl.surface, two.mean(axis=0), two, steps=(10, 20), best=1, points_a_side=5)
