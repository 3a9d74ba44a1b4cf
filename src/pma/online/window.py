"""A sliding window over the last interval means, or over the last snapshots, in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pma.online.sums import Sum, divided

if TYPE_CHECKING:
    import torch


class SlidingWindow:
    """The last `last` sums. A snapshot is the sum of one step, so both kinds are averaged alike."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.sums: deque[Sum] = deque(maxlen=last)

    def next_sum(self) -> Sum:
        """An empty sum to push next, in the memory of the one that will leave the window."""
        return Sum(tensors=self.sums.popleft().tensors) if len(self.sums) == self.last else Sum()

    def push(self, newest: Sum) -> None:
        """Add the newest; the oldest leaves a full window."""
        self.sums.append(newest)

    @property
    def updates(self) -> int:
        """Steps that are in the window's mean."""
        return sum(entry.updates for entry in self.sums)

    def mean(self) -> Iterator[torch.Tensor]:
        """Every recorded step with the same weight: sums added oldest first in fp32, divided once; one tensor
        at a time.
        """
        updates = self.updates
        for sums in zip(*(entry.tensors for entry in self.sums), strict=True):
            total = sums[0].clone()
            for later in sums[1:]:
                total += later
            yield divided(total, updates)
