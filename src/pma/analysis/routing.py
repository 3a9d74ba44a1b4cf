"""Where a mixture of experts sends its tokens: how far two models agree, and how evenly experts are used."""

# L layers, T tokens, E experts, K experts a token goes to

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pma.analysis.windows import TokenWindows
from pma.errors import InputError
from pma.evaluation.paired import Estimate, by_document, mean_estimate

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """`chosen_LTK`: each token's experts in each layer, in no order. `experts`: how many there are, E.
    `document_T`: which document a token is of.
    """

    chosen_LTK: NDArray[np.int64]
    experts: int
    document_T: NDArray[np.int64]

    def load(self, tokens: ArrayLike | None = None) -> Values:
        """Each expert's share of its layer's choices, shape (L, E): a layer's shares add up to one.
        `tokens`: by number or as a mask, which of them; by default all.
        """
        chosen = self.chosen_LTK if tokens is None else self.chosen_LTK[:, np.asarray(tokens)]
        counts = [np.bincount(layer.ravel(), minlength=self.experts) for layer in chosen]
        return np.asarray(np.array(counts) / chosen[0].size)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How even loads are, by layer: `entropy_L` over that of equal loads (1 is even, 0 one expert),
    `heaviest_L` and `variation_L`, the largest load and the standard deviation over the mean (even: 1 and 0).
    """

    entropy_L: Values
    heaviest_L: Values
    variation_L: Values


def from_logits(logits_LTE: ArrayLike, *, top: int, document_T: ArrayLike) -> Routing:
    """Each token goes to the `top` experts of highest logit."""
    logits = np.asarray(logits_LTE)
    chosen = np.argpartition(-logits, top - 1, axis=-1)[..., :top]
    return Routing(chosen_LTK=chosen, experts=logits.shape[-1], document_T=np.asarray(document_T))


def has_experts(model: Any) -> bool:
    """Whether the model's configuration says that tokens choose experts."""
    return bool(getattr(model.config, "num_experts_per_tok", None))


def of_model(model: Any, windows: TokenWindows, *, windows_a_batch: int = 16) -> Routing:
    """The routing of a mixture of transformers that tells its routers' logits (OLMoE and its like).

    Raises InputError for a model without routers.
    """
    if not has_experts(model):
        raise InputError(
            f"a {model.config.model_type} model has no experts, expected a mixture of experts such as OLMoE"
        )
    if not hasattr(model.config, "output_router_logits"):
        raise InputError(f"a {model.config.model_type} model does not tell its routers' logits")
    device = next(model.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(windows.ids_WC), windows_a_batch):
            ids_WC = torch.from_numpy(windows.ids_WC[start : start + windows_a_batch, :-1]).to(device)
            told = model(input_ids=ids_WC, use_cache=False, output_router_logits=True).router_logits
            parts.append(torch.stack(list(told)).float().cpu().numpy())
    document_T = np.repeat(windows.document_W, windows.ids_WC.shape[1] - 1)
    return from_logits(
        np.concatenate(parts, axis=1), top=int(model.config.num_experts_per_tok), document_T=document_T
    )


def agreement(a: Routing, b: Routing) -> Values:
    """The share of a token's experts that both models send it to, shape (L, T). Two that know nothing of each
    other agree on K / E.
    """
    if a.chosen_LTK.shape != b.chosen_LTK.shape or a.experts != b.experts:
        raise InputError(
            f"routing of {_shape(a)} and of {_shape(b)} cannot be compared; expected the same text and "
            "models of one architecture"
        )
    both = a.chosen_LTK[..., :, None] == b.chosen_LTK[..., None, :]
    return np.asarray(both.any(axis=-1).mean(axis=-1))


def over_documents(value_T: ArrayLike, document_T: ArrayLike) -> Estimate:
    """Mean over tokens with its error over the documents that they are of."""
    documents, index_T = np.unique(np.asarray(document_T), return_inverse=True)
    return mean_estimate(*by_document(index_T, value_T, len(documents)))


def balance(load_LE: ArrayLike) -> Balance:
    """How even these loads are."""
    load = np.asarray(load_LE, dtype=np.float64)
    share = load / load.sum(axis=1, keepdims=True)
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    mean_L = load.mean(axis=1)
    return Balance(
        entropy_L=-terms.sum(axis=1) / np.log(load.shape[1]),
        heaviest_L=load.max(axis=1) / mean_L,
        variation_L=load.std(axis=1) / mean_L,
    )


def _shape(routing: Routing) -> str:
    layers, tokens, top = routing.chosen_LTK.shape
    return f"{layers} layers × {tokens} tokens × {top} of {routing.experts} experts"
