"""Slopes and curvatures against closed forms, finite differences and dense Hessians."""

import numpy as np
import pytest
import torch

from pma.analysis.curvature import Surface, of_model
from pma.analysis.parameters import Layout

from .models import tiny_model, tiny_windows

RANDOM = np.random.default_rng(0)


def quadratic(parameters: int = 6, batches: int = 2) -> tuple[Surface, np.ndarray, np.ndarray]:
    """Batches of L_b = g_bᵀθ + ½ θᵀH_bθ; the surface, g of each and H of each."""
    slopes = RANDOM.standard_normal((batches, parameters))
    raw = RANDOM.standard_normal((batches, parameters, parameters))
    hessians = raw + raw.transpose(0, 2, 1)

    def loss(b: int):
        g, h = torch.tensor(slopes[b]), torch.tensor(hessians[b])

        def of(named):
            theta = torch.cat([named["a"].flatten(), named["b"]])
            return g @ theta + theta @ h @ theta / 2

        return of

    surface = Surface(
        layout=Layout(shapes={"a": (2, 2), "b": (parameters - 4,)}),
        batch_losses=[loss(b) for b in range(batches)],
        share_B=np.array([0.25, 0.75]),
        dtype=torch.float64,
    )
    return surface, slopes, hessians


def test_a_quadratic_is_known_in_closed_form():
    surface, slopes, hessians = quadratic()
    theta, directions = RANDOM.standard_normal(6), RANDOM.standard_normal((3, 6))
    mean_slope = surface.share_B @ slopes
    mean_hessian = np.tensordot(surface.share_B, hessians, 1)

    assert surface.loss(theta) == pytest.approx(mean_slope @ theta + theta @ mean_hessian @ theta / 2)
    np.testing.assert_allclose(surface.gradient(theta), mean_slope + mean_hessian @ theta)
    np.testing.assert_allclose(surface.product(theta, directions[0]), mean_hessian @ directions[0])
    expansion = surface.expand(theta, directions)
    for b in range(2):
        gradient = slopes[b] + hessians[b] @ theta
        np.testing.assert_allclose(expansion.slope_BK[b], directions @ gradient)
        np.testing.assert_allclose(expansion.curvature_BKK[b], directions @ hessians[b] @ directions.T)
        assert expansion.loss_B[b] == pytest.approx(surface.losses(theta)[b])


def test_a_linear_loss_has_no_curvature():
    surface = Surface(
        layout=Layout(shapes={"a": (3,)}),
        batch_losses=[lambda named: 2 * named["a"].sum()],
        share_B=np.ones(1),
        dtype=torch.float64,
    )
    assert not surface.product(np.ones(3), np.ones(3)).any()
    assert not surface.expand(np.ones(3), np.eye(3)).curvature_BKK.any()


@pytest.mark.parametrize("experts", [0, 4])
def test_the_loss_is_the_mean_token_loss_of_the_model(experts):
    model, windows = tiny_model(experts=experts), tiny_windows()
    ids = torch.from_numpy(windows.ids_WC)
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits.double().log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None]).mean()
    surface = of_model(model, windows, batches=3)
    theta = surface.layout.vector(dict(model.named_parameters()))
    assert len(surface.batch_losses) == 3
    assert surface.loss(theta) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("experts", [0, 4])
def test_products_are_differences_of_gradients(experts):
    # norms and attention are fp32 inside, so the step cannot be small: the error of a central difference is
    # of its square
    surface, theta = _of_tiny(experts)
    direction = RANDOM.standard_normal(surface.layout.length)
    direction /= np.linalg.norm(direction)
    step = 1e-3
    ahead, back = (surface.gradient(theta + sign * step * direction) for sign in (1, -1))
    difference = (ahead - back) / (2 * step)
    product = surface.product(theta, direction)
    assert np.linalg.norm(product) > 0.01
    assert np.linalg.norm(product - difference) < 5e-3 * np.linalg.norm(product)
    slope = (surface.loss(theta + step * direction) - surface.loss(theta - step * direction)) / (2 * step)
    assert surface.gradient(theta) @ direction == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("experts", [0, 4])
def test_an_expansion_is_made_of_gradient_and_products(experts):
    surface, theta = _of_tiny(experts)
    directions = RANDOM.standard_normal((2, surface.layout.length))
    expansion = surface.expand(theta, directions)
    products = np.array([surface.product(theta, each) for each in directions])
    np.testing.assert_allclose(
        surface.share_B @ expansion.slope_BK, directions @ surface.gradient(theta), rtol=1e-6
    )
    np.testing.assert_allclose(
        np.tensordot(surface.share_B, expansion.curvature_BKK, 1),
        directions @ products.T,
        rtol=1e-3,
        atol=1e-3,
    )


def _of_tiny(experts):
    model = tiny_model(experts=experts)
    surface = of_model(model, tiny_windows(), batches=2, dtype=torch.float64)
    return surface, surface.layout.vector(dict(model.named_parameters()))
