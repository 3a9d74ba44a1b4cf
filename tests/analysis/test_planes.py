"""Planes against points whose place is known."""

import numpy as np
import pytest

from pma.analysis import planes
from pma.errors import InputError

RANDOM = np.random.default_rng(3)


def test_three_points_lie_in_their_plane_at_their_own_distances():
    points = RANDOM.standard_normal((3, 50))
    plane = planes.through(points)
    at = plane.coordinates(points)
    for i in range(3):
        for j in range(3):
            assert np.linalg.norm(at[i] - at[j]) == pytest.approx(np.linalg.norm(points[i] - points[j]))
        np.testing.assert_allclose(plane.point(*at[i]), points[i])
    np.testing.assert_allclose(plane.distances(points), 0, atol=1e-12)
    np.testing.assert_allclose(plane.coordinates(points.mean(axis=0))[0], 0, atol=1e-12)
    np.testing.assert_allclose(plane.axes_2P @ plane.axes_2P.T, np.eye(2), atol=1e-12)


def test_what_stands_above_a_plane_is_projected():
    points = np.array([[0.0, 0, 0], [2, 0, 0], [0, 3, 0]])
    plane = planes.through(points)
    assert plane.distances([1.0, 1, 5])[0] == pytest.approx(5)
    np.testing.assert_allclose(
        plane.coordinates([1.0, 1, 5])[0] - plane.coordinates([0.0, 0, 0])[0], [1, 1], atol=1e-12
    )


@pytest.mark.parametrize("points", [[[0, 0], [1, 1], [2, 2]], [[1, 1], [1, 1], [2, 0]]])
def test_points_on_a_line_are_refused(points):
    with pytest.raises(InputError, match="lie on a line"):
        planes.through(np.array(points, dtype=float))


def test_principal_directions_are_those_of_the_singular_values():
    points = RANDOM.standard_normal((7, 4)) @ np.diag([5, 3, 0.5, 0.1]) @ RANDOM.standard_normal((4, 60))
    plane, shares = planes.principal(points)
    deviations = points - points.mean(axis=0)
    _, singular, directions = np.linalg.svd(deviations, full_matrices=False)
    np.testing.assert_allclose(shares, singular**2 / (singular**2).sum(), atol=1e-12)
    np.testing.assert_allclose(np.abs(plane.axes_2P @ directions[:2].T), np.eye(2), atol=1e-9)
    assert (plane.coordinates(points[-1])[0] >= 0).all()
    left = (plane.distances(points) ** 2).sum()
    assert left == pytest.approx((singular[2:] ** 2).sum())


def test_two_points_or_equal_ones_span_no_plane():
    for points in (RANDOM.standard_normal((2, 5)), np.ones((4, 5))):
        with pytest.raises(InputError, match="span no plane"):
            planes.principal(points)


def test_a_grid_holds_the_loss_of_each_of_its_points_by_batch():
    plane = planes.through(np.array([[0.0, 0, 1], [1, 0, 1], [0, 1, 1]]))
    x, y = np.array([-1.0, 0.5]), np.array([0.0, 2.0, 3.0])
    found = planes.grid(lambda theta: np.array([theta.sum(), (theta**2).sum()]), plane, x, y)
    assert found.losses_GYX.shape == (2, 3, 2)
    theta = plane.point(0.5, 2.0)
    assert found.losses_GYX[:, 1, 1] == pytest.approx([theta.sum(), (theta**2).sum()])


def test_an_axis_reaches_beyond_what_it_shows():
    np.testing.assert_allclose(planes.axis([2.0, 0.0, 1.0], points=5, margin=0.5), [-1, 0, 1, 2, 3])


def test_the_minimum_of_a_quadratic_form_is_found_between_the_grids_points():
    x, y = np.linspace(-2, 3, 11), np.linspace(-4, 4, 9)
    losses = 3 * (x - 0.37) ** 2 + (y[:, None] + 1.21) ** 2 + 0.8 * (x - 0.37) * (y[:, None] + 1.21) + 5
    found = planes.minimum(x, y, losses)
    assert found == pytest.approx((0.37, -1.21))


def test_a_minimum_outside_or_none_at_all_is_not_given():
    x = y = np.linspace(-1, 1, 7)
    assert planes.minimum(x, y, (x - 5) ** 2 + y[:, None] ** 2) is None
    trough = np.minimum((x - 0.1) ** 2, 0.3) - 0.2 * y[:, None] ** 4
    assert planes.minimum(x, y, trough) is None
