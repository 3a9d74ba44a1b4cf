"""Power-function averages kept while training, and other averages put together from them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pma.averaging.power_ema import gamma_from_sigma, share_kept
from pma.online.sums import wide_copies

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Track:
    """One running average of relative width `sigma`: fp32, one tensor an entry. `last_step` is its newest."""

    sigma: float
    tensors: list[torch.Tensor] = field(default_factory=list)
    first_step: int = 0
    last_step: int = 0

    @property
    def gamma(self) -> float:
        """Its exponent."""
        return gamma_from_sigma(self.sigma)

    def advance(self, step: int) -> float:
        """Take note of a step; the share that is kept of what was before it, 0 at the first."""
        kept = share_kept(self.gamma, self.last_step, step) if self.last_step else 0.0
        self.first_step = self.first_step or step
        self.last_step = step
        return kept

    def add(self, values: Sequence[torch.Tensor], kept: float) -> None:
        """Average += (1 - kept) · (values - average)."""
        if kept == 0.0:
            self.tensors = wide_copies(values, into=self.tensors)
            return
        for average, value in zip(self.tensors, values, strict=True):
            average.lerp_(value.to(average.dtype), 1.0 - kept)
