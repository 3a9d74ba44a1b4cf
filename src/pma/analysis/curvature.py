"""A mean loss as a function of all parameters: its value, gradient, and Hessian along directions.

The Hessian H is never made; H v is the gradient of the gradient's inner product with v. In a mixture of
experts the choice of experts is a step function: its derivatives are those of the piece of the routing in
force, and what changes when tokens go to other experts is in no derivative.
"""

# P parameters, K directions, B batches of text, C context length in tokens, V words

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pma.analysis.parameters import Layout, Vector
from pma.analysis.windows import TokenWindows
from pma.evaluation.paired import Estimate, mean_estimate

Values = NDArray[np.float64]
BatchLoss = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """The second-order expansion at a point along K directions d, by batch of text: `slope_BK` is gᵀd,
    `curvature_BKK` is dᵢᵀ H dⱼ, `loss_B` the loss there.
    """

    loss_B: Values
    slope_BK: Values
    curvature_BKK: Values


@dataclass(frozen=True, kw_only=True)
class Surface:
    """L(θ) = Σ_b share_b L_b(θ) over batches of text. `batch_losses`: L_b of parameters by name, one a batch.
    `share_B`: each batch's share of the tokens, `tokens` in all where it is of a text.
    """

    layout: Layout
    batch_losses: Sequence[BatchLoss]
    share_B: Values
    tokens: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def losses(self, theta_P: ArrayLike) -> Values:
        """The loss on each batch, shape (B,)."""
        parameters = self.layout.tensors(self._tensor(theta_P))
        with torch.no_grad():
            return np.array([float(loss(parameters)) for loss in self.batch_losses])

    def loss(self, theta_P: ArrayLike) -> float:
        """The loss on all of the text."""
        return float(self.share_B @ self.losses(theta_P))

    def gradient(self, theta_P: ArrayLike) -> Vector:
        """dL/dθ, shape (P,)."""
        theta = self._tensor(theta_P).requires_grad_()
        total = torch.zeros_like(theta, dtype=torch.float64, requires_grad=False)
        for share, batch_loss in zip(self.share_B, self.batch_losses, strict=True):
            (gradient,) = torch.autograd.grad(batch_loss(self.layout.tensors(theta)), theta)
            total += float(share) * gradient.double()
        return _array(total)

    def product(self, theta_P: ArrayLike, direction_P: ArrayLike) -> Vector:
        """H v at θ, shape (P,)."""
        theta, direction = self._tensor(theta_P).requires_grad_(), self._tensor(direction_P)
        total = torch.zeros_like(direction, dtype=torch.float64)
        for share, batch_loss in zip(self.share_B, self.batch_losses, strict=True):
            loss = batch_loss(self.layout.tensors(theta))
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            total += float(share) * _derivative(gradient @ direction, theta).double()
        return _array(total)

    def expand(self, theta_P: ArrayLike, directions_KP: ArrayLike) -> Expansion:
        """Slopes and curvatures along the directions at θ, batch by batch."""
        theta, directions_KP = self._tensor(theta_P).requires_grad_(), self._tensor(directions_KP)
        losses, slopes, curvatures = [], [], []
        for batch_loss in self.batch_losses:
            loss = batch_loss(self.layout.tensors(theta))
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            slope_K = directions_KP @ gradient
            products_KP = torch.stack([_derivative(slope, theta) for slope in slope_K])
            curvature_KK = directions_KP.double() @ products_KP.double().T
            losses.append(float(loss.detach()))
            slopes.append(_array(directions_KP.double() @ gradient.detach().double()))
            curvatures.append(_array((curvature_KK + curvature_KK.T) / 2))
        return Expansion(
            loss_B=np.array(losses), slope_BK=np.array(slopes), curvature_BKK=np.array(curvatures)
        )

    def _tensor(self, values: ArrayLike) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=self.dtype, device=self.device)


def of_model(
    model: Any, windows: TokenWindows, *, batches: int, dtype: torch.dtype = torch.float32
) -> Surface:
    """The mean token loss of a causal LM of transformers over `windows`, cut into about `batches` parts that
    share no document. The model is put into evaluation mode, and attention and experts into their plain form:
    fused kernels have no second derivative. Norms and attention weights are fp32 inside whatever `dtype`. A
    mixture's balancing loss is left out.
    """
    model.set_attn_implementation("eager")
    if any(getattr(model.config, name, None) for name in ("num_experts", "num_local_experts")):
        model.set_experts_implementation("eager")
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    model.eval().to(dtype).requires_grad_(False)
    parts = windows.batches(batches)
    device = next(model.parameters()).device
    tokens_B = np.array([part.ids_WC[:, 1:].size for part in parts], dtype=np.float64)
    return Surface(
        layout=Layout.of_model(model),
        batch_losses=[_token_loss(model, torch.from_numpy(part.ids_WC).to(device)) for part in parts],
        share_B=tokens_B / tokens_B.sum(),
        tokens=int(tokens_B.sum()),
        dtype=dtype,
        device=str(device),
    )


def over_batches(value_B: ArrayLike, share_B: ArrayLike) -> Estimate:
    """Mean over the text with its error over batches: they share no document, so they are the unit of
    chance.
    """
    share = np.asarray(share_B, dtype=np.float64)
    return mean_estimate(np.asarray(value_B, dtype=np.float64) * share, share)


def _token_loss(model: Any, ids_WC: Tensor) -> BatchLoss:
    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        given = {"input_ids": ids_WC[:, :-1], "use_cache": False}
        logits_WCV = torch.func.functional_call(model, dict(parameters), (), given).logits
        return torch.nn.functional.cross_entropy(logits_WCV.flatten(0, 1), ids_WC[:, 1:].flatten())

    return loss


def _derivative(value: Tensor, theta: Tensor) -> Tensor:
    """Of a function that may not depend on θ at all, such as the slope of a linear loss."""
    if not value.requires_grad:
        return torch.zeros_like(theta)
    (derivative,) = torch.autograd.grad(value, theta, retain_graph=True, materialize_grads=True)
    return derivative


def _array(tensor: Tensor) -> Values:
    values: Values = tensor.detach().cpu().double().numpy()
    return values
