"""Spectra against dense eigenvalues."""

import numpy as np
import pytest
import torch

from pma.analysis import spectra
from pma.analysis.curvature import of_model

from .models import tiny_model, tiny_windows

RANDOM = np.random.default_rng(2)


def test_both_ends_are_those_of_the_dense_matrix():
    raw = RANDOM.standard_normal((40, 40))
    matrix = raw + raw.T
    dense = np.linalg.eigvalsh(matrix)
    found = spectra.ends(lambda v: matrix @ v, 40, count=3, tolerance=1e-8)
    np.testing.assert_allclose(found.largest_K, dense[::-1][:3])
    np.testing.assert_allclose(found.smallest_K, dense[:3])
    assert max(found.largest_residual_K.max(), found.smallest_residual_K.max()) < 1e-6


def test_a_models_ends_are_those_of_its_dense_hessian():
    model = tiny_model()
    surface = of_model(model, tiny_windows(), batches=1, dtype=torch.float64)
    theta = surface.layout.vector(dict(model.named_parameters()))
    # independent of products: torch's own dense Hessian, of the model's loss as it stands
    dense = torch.autograd.functional.hessian(
        lambda flat: surface.batch_losses[0](surface.layout.tensors(flat)), torch.tensor(theta)
    )
    eigenvalues = np.linalg.eigvalsh(dense.numpy())
    found = spectra.ends(lambda v: surface.product(theta, v), len(theta), count=2, tolerance=1e-5)
    np.testing.assert_allclose(found.largest_K, eigenvalues[::-1][:2], rtol=1e-3)
    np.testing.assert_allclose(found.smallest_K, eigenvalues[:2], rtol=1e-3)


def test_a_vectors_measure_is_its_squares_in_the_eigenbasis():
    values = np.array([-2.0, -2.0, 0.5, 3.0, 3.0, 7.0])
    basis, _ = np.linalg.qr(RANDOM.standard_normal((6, 6)))
    matrix = basis @ np.diag(values) @ basis.T
    vector = RANDOM.standard_normal(6)
    shares = (basis.T @ vector) ** 2
    found = spectra.measure(lambda v: matrix @ v, vector, steps=6)
    np.testing.assert_allclose(found.node_M, [-2, 0.5, 3, 7], atol=1e-8)  # as many as there are values
    np.testing.assert_allclose(
        found.weight_M, [shares[:2].sum(), shares[2], shares[3:5].sum(), shares[5]], atol=1e-8
    )
    assert found.positive == pytest.approx(shares[2:] @ values[2:])
    assert found.negative == pytest.approx(shares[:2] @ values[:2])


def test_the_curvature_is_exact_after_one_step():
    raw = RANDOM.standard_normal((9, 9))
    matrix, vector = raw + raw.T, RANDOM.standard_normal(9)
    for steps in (1, 4):
        found = spectra.measure(lambda v: matrix @ v, vector, steps=steps)
        assert found.curvature == pytest.approx(vector @ matrix @ vector)
        assert found.weight_M.sum() == pytest.approx(vector @ vector)
        assert len(found.node_M) == steps
