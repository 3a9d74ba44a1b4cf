"""Averages under the names, and in the pieces, that a checkpoint of the model stores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pma.online.entries import Entry

if TYPE_CHECKING:
    import torch
    from torch import nn

Tensors = dict[str, "torch.Tensor"]
#: from averages by entry name to averages as they are stored
AsStored = Callable[[Tensors], Tensors]


def stored_by(model: nn.Module, entries: Sequence[Entry]) -> AsStored:
    """How `save_pretrained` stores a transformers model; for any other, how its state dict names tensors."""
    transformers = sys.modules.get("transformers")  # a model of it has brought it
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return lambda tensors: _by_transformers(model, _every_name(entries, tensors))
    return lambda tensors: _every_name(entries, tensors)


def _every_name(entries: Sequence[Entry], tensors: Tensors) -> Tensors:
    """Tied weights under each of their names, as a state dict has them."""
    return {name: tensors[entry.name] for entry in entries for name in (entry.name, *entry.others)}


def _by_transformers(model: Any, tensors: Tensors) -> Tensors:
    """What `save_pretrained` would store: tied weights once, a mixture's experts one by one.

    Source: transformers 5.23, `PreTrainedModel.save_pretrained`.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    stored: Tensors = revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))
    return stored
