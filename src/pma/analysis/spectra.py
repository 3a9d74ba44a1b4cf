"""The spectrum of a symmetric operator that is known by its products alone: both ends, and how a vector's
curvature divides over it.
"""

# P parameters, K eigenvalues, M Lanczos steps

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Product = Callable[[Values], Values]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The algebraically largest eigenvalues, falling, and the smallest, rising, with ‖Hv − λv‖ of each (v of
    length one).
    """

    largest_K: Values
    largest_residual_K: Values
    smallest_K: Values
    smallest_residual_K: Values


def ends(product: Product, parameters: int, *, count: int, tolerance: float = 1e-2, seed: int = 0) -> Ends:
    """`count` eigenvalues at each end, by ARPACK's Lanczos iteration with restarts. `tolerance`: relative."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((parameters, parameters), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(parameters)
    found = []
    for which in ("LA", "SA"):
        values, vectors = eigsh(operator, k=count, which=which, tol=tolerance, v0=start)
        order = np.argsort(-values if which == "LA" else values)
        residuals = [float(np.linalg.norm(product(vectors[:, k]) - values[k] * vectors[:, k])) for k in order]
        found += [values[order], np.array(residuals)]
    return Ends(
        largest_K=found[0], largest_residual_K=found[1], smallest_K=found[2], smallest_residual_K=found[3]
    )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a vector lies in the spectrum: at `node_M`, estimates of eigenvalues, `weight_M` of its squared
    length.
    """

    node_M: Values
    weight_M: Values

    @property
    def curvature(self) -> float:
        """vᵀHv; exact, whatever the number of steps."""
        return float(self.weight_M @ self.node_M)

    @property
    def positive(self) -> float:
        """The part of vᵀHv from directions that curve upwards."""
        return float(self.weight_M @ np.maximum(self.node_M, 0))

    @property
    def negative(self) -> float:
        """The part of vᵀHv from directions that curve downwards, at most zero."""
        return float(self.weight_M @ np.minimum(self.node_M, 0))


def measure(product: Product, vector_P: ArrayLike, *, steps: int) -> Measure:
    """The spectral measure of a vector by Gauss quadrature: `steps` products of Lanczos, with full
    reorthogonalisation. Moments up to 2 · steps − 1 are exact.

    Source: Golub and Meurant, Matrices, Moments and Quadrature (2010), ch. 6.
    """
    vector = np.asarray(vector_P, dtype=np.float64)
    length = float(np.linalg.norm(vector))
    basis, diagonal, beside = [vector / length], [], []
    for _ in range(steps):
        image = np.asarray(product(basis[-1]), dtype=np.float64)
        diagonal.append(float(basis[-1] @ image))
        before = float(np.linalg.norm(image))
        for _ in range(2):  # once is not enough where products are in fp32
            for each in basis:
                image = image - (each @ image) * each
        rest = float(np.linalg.norm(image))
        if len(diagonal) == steps or rest <= 1e-6 * before:  # the vector's own space is used up
            break
        beside.append(rest)
        basis.append(image / rest)
    steps_made = len(diagonal)
    tridiagonal_MM = (
        np.diag(diagonal) + np.diag(beside[: steps_made - 1], 1) + np.diag(beside[: steps_made - 1], -1)
    )
    nodes, vectors_MM = np.linalg.eigh(tridiagonal_MM)
    return Measure(node_M=nodes, weight_M=length**2 * vectors_MM[0] ** 2)
