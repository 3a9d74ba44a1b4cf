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
    model: nn.Module, entries: Sequence[Entry], averages: Iterator[torch.Tensor], *, broadcast: bool
) -> Iterator[None]:
    """The model has `averages` (this process's parts, in the order of entries) inside the block, its own
    weights after. Whatever ends the block, the weights come back.

    `broadcast`: only rank 0 has averages, so every rank enters the block and is sent them.
    """
    import torch

    with torch.no_grad():
        own = [entry.local.clone() for entry in entries]
    try:
        with torch.no_grad():
            for entry in entries:
                _put(entry.local, next(averages, None), broadcast)
        reshard(model)  # what FSDP2 still holds gathered are the weights
        yield
    finally:
        with torch.no_grad():
            for entry, weights in zip(entries, own, strict=True):
                entry.local.copy_(weights)
        reshard(model)  # and now the averages


def in_order(entries: Sequence[Entry], tensors: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors by name in the order of entries. Raises MismatchError unless all fit, before any is used."""
    found = [tensors.get(entry.name) for entry in entries]
    for entry, tensor in zip(entries, found, strict=True):
        if tensor is None or tensor.shape != entry.local.shape:
            what = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise MismatchError(
                f"average of {printable(entry.name)} is {what}, expected {tuple(entry.local.shape)} as in "
                "the model"
            )
    return (tensor for tensor in found if tensor is not None)


def _put(place: torch.Tensor, average: torch.Tensor | None, broadcast: bool) -> None:
    if broadcast:
        import torch
        import torch.distributed as dist

        sent = torch.empty_like(place)
        if average is not None:
            sent.copy_(average)
        dist.broadcast(sent, src=0)
        average = sent
    assert average is not None, "as many averages as entries"
    place.copy_(average)
