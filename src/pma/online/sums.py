"""The sum of the weights over an interval, in fp32: added in the order of steps, divided once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Sum:
    """Sums of `updates` steps' values, from `first_step` to `last_step`, one tensor an entry.

    `averaged`: which of `formats.interval_mean.AVERAGED` they are. `ended`: the next update begins anew.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    updates: int = 0
    first_step: int = 0
    last_step: int = 0
    averaged: str = "weights"
    ended: bool = False

    def count(self, step: int, averaged: str) -> bool:
        """Take note of an update; whether it is the first, which replaces what the tensors hold."""
        first = self.ended or self.updates == 0
        if first:
            self.first_step, self.updates, self.ended = step, 0, False
        self.averaged = averaged if first else together((self.averaged, averaged))
        self.updates += 1
        self.last_step = step
        return first

    def add(self, values: Sequence[torch.Tensor], *, first: bool) -> None:
        """Add a step's values, rounding each sum to fp32."""
        import torch

        if first:
            self.tensors = wide_copies(values, into=self.tensors)
        elif values:
            torch._foreach_add_(self.tensors, [wide(value) for value in values])

    def mean(self) -> Iterator[torch.Tensor]:
        """The sums divided by the number of updates, each rounded once; new tensors where the sums are, one
        at a time.
        """
        # sum first, divide once: as merges do
        return (divided(tensor, self.updates) for tensor in self.tensors)


def together(averaged: Iterable[str]) -> str:
    """What an average of values of these kinds is of: rounded weights if any are."""
    found = set(averaged)
    return next((kind for kind in ("rounded weights", "masters") if kind in found), "weights")


def wide(value: torch.Tensor) -> torch.Tensor:
    """As it is added: fp32 or narrower (which fp32 takes exactly), a complex number as two of those."""
    import torch

    return value.to(torch.float32) if value.dtype == torch.float64 else value


def wide_copies(values: Sequence[torch.Tensor], into: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of `values` in fp32, in the memory of `into` where that fits."""
    import torch

    if len(into) != len(values) or any(a.device != b.device for a, b in zip(into, values, strict=True)):
        kept = torch.preserve_format
        into = [torch.empty_like(v, dtype=kept_dtype(v), memory_format=kept) for v in values]
    for copy, value in zip(into, values, strict=True):
        copy.copy_(value)
    return into


def kept_dtype(value: torch.Tensor) -> torch.dtype:
    """The type that averages of it are kept in."""
    import torch

    return torch.complex64 if value.is_complex() else torch.float32


def divided(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """`tensor` / `by`, correctly rounded."""
    import torch

    # a divisor that is a number, or a tensor on the CPU, becomes a multiplication by its reciprocal on a GPU
    return tensor / torch.tensor(float(by), dtype=torch.float32, device=tensor.device)
