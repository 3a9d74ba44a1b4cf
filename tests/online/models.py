"""Small models, weights that change at each step, and what their averages must be, in numpy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


class Tiny(nn.Module):
    """Two matrices, one of them tied to a third name; buffers of both kinds, and one that is not stored."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.inner = nn.Linear(6, 6, dtype=dtype)
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("expert_bias", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(tokens)))


NAMES = ("embed.weight", "inner.weight", "inner.bias", "expert_bias")


def step_of(model: nn.Module, step: int) -> None:
    """Stands in for an optimizer: other weights of all magnitudes, in place; buffers are replaced."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)
        model.expert_bias = torch.randn(4, generator=generator)
        model.seen += 1


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of what is averaged."""
    state = model.state_dict()
    return {name: state[name].to(torch.float32).numpy().copy() for name in NAMES}


def sequential_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """The reference: summed in fp32 one after the other, divided once."""
    total = values[0].astype(np.float32)
    for value in values[1:]:
        total = total + value.astype(np.float32)
    return total / np.float32(len(values))


def exact_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """In fp64, as the engine averages fp32 checkpoints."""
    return np.mean([value.astype(np.float64) for value in values], axis=0)
