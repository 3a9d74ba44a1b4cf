"""All parameters of a model as one vector, in the model's own order."""

# P parameters in all

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and shapes of what a vector holds, in order. Tied parameters count once, under the first name."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of_model(cls, model: Any) -> Layout:
        """That of a torch module's parameters."""
        return cls(shapes={name: tuple(each.shape) for name, each in model.named_parameters()})

    @property
    def length(self) -> int:
        """How many numbers a vector has, P."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def vector(self, tensors: Mapping[str, Tensor]) -> Vector:
        """The named tensors as one vector in fp64, shape (P,)."""
        flat = [tensors[name].detach().cpu().double().numpy().ravel() for name in self.shapes]
        return np.concatenate(flat)

    def tensors(self, vector_P: Tensor) -> dict[str, Tensor]:
        """The vector's parts by name, in their shapes; views where torch can give them."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = vector_P.split(sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
