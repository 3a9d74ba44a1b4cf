"""Puts averages in the place of a model's weights for a while, and the weights back, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pma.errors import MismatchError, printable
from pma.online.entries import Entry, reshard

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def swapped(
    model: nn.Module, entries: Sequence[Entry], averages: Mapping[str, torch.Tensor], *, broadcast: bool
) -> Iterator[None]:
    """The model has `averages` (this process's parts, by entry name) inside the block, its own weights after.

    `broadcast`: the averages are rank 0's alone, so every rank enters the block and is sent them. Whatever
    ends the block, the weights come back.
    """
    import torch

    if not broadcast:
        _check(entries, averages)
    with torch.no_grad():
        own = [entry.local.clone() for entry in entries]
    try:
        with torch.no_grad():
            for entry in entries:
                _put(entry.local, averages.get(entry.name), broadcast)
        reshard(model)  # what FSDP2 still holds gathered are the weights
        yield
    finally:
        with torch.no_grad():
            for entry, weights in zip(entries, own, strict=True):
                entry.local.copy_(weights)
        reshard(model)  # and now the averages


def _check(entries: Sequence[Entry], averages: Mapping[str, torch.Tensor]) -> None:
    for entry in entries:
        average = averages.get(entry.name)
        if average is None or average.shape != entry.local.shape:
            found = "missing" if average is None else f"of shape {tuple(average.shape)}"
            raise MismatchError(
                f"average of {printable(entry.name)} is {found}, expected {tuple(entry.local.shape)} as in "
                "the model"
            )


def _put(place: torch.Tensor, average: torch.Tensor | None, broadcast: bool) -> None:
    if broadcast:
        import torch
        import torch.distributed as dist

        sent = torch.empty_like(place)
        if average is not None:
            sent.copy_(average)
        dist.broadcast(sent, src=0)
        place.copy_(sent)
    elif average is not None:
        place.copy_(average)
