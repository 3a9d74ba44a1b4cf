"""Log-likelihoods of text under a causal language model, document by document."""

# D documents, W windows in a batch, C context length in tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pma.errors import InputError

Progress = Callable[[int], None]
TOKENS_A_BATCH = 8_192


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model and its tokenizer, ready to score. `context_tokens`: how many tokens it looks at, C."""

    model: Any
    tokenizer: Tokenizer
    context_tokens: int

    @property
    def start_token(self) -> int:
        """What stands before the first token of a document."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise InputError(
            "the tokenizer has neither a beginning- nor an end-of-text token to start a document with"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def document_losses(
    scorer: Scorer, texts: Sequence[str], progress: Progress | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Nats and token counts of each document, shapes (D,) and (D,).

    A document is cut into windows of C tokens that do not overlap, each starting afresh; every token is
    predicted once, the first of a document from the start token.
    """
    windows: list[tuple[int, list[int], int]] = []  # (document, C+1 tokens, how many of them are given)
    for d, text in enumerate(texts):
        tokens = [scorer.start_token, *scorer.encode(text)]
        for start in range(0, len(tokens) - 1, scorer.context_tokens):
            windows.append((d, tokens[start : start + scorer.context_tokens + 1], 1))
    nats_D = np.zeros(len(texts))
    tokens_D = np.zeros(len(texts), dtype=np.int64)
    for batch in _batches(windows, scorer.context_tokens):
        for (d, tokens, _), nats in zip(batch, _window_nats(scorer, batch), strict=True):
            nats_D[d] += nats
            tokens_D[d] += len(tokens) - 1
        if progress is not None:
            progress(len(batch))
    return nats_D, tokens_D


def continuation_nats(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """-log p(continuation | context) in nats of each pair; a long context loses its beginning, never its
    end.
    """
    windows = []
    for index, (context, continuation) in enumerate(pairs):
        given = [scorer.start_token, *scorer.encode(context)]
        wanted = scorer.encode(continuation)[: scorer.context_tokens]
        given = given[-(scorer.context_tokens + 1 - len(wanted)) :]
        windows.append((index, given + wanted, len(given)))
    return _nats(scorer, windows)


def response_nats(scorer: Scorer, rows: Sequence[tuple[Sequence[int], int]]) -> NDArray[np.float64]:
    """Nats of each row's tokens behind those that are given: (token ids, how many of them are given)."""
    return _nats(scorer, [(index, list(tokens), given) for index, (tokens, given) in enumerate(rows)])


def _nats(scorer: Scorer, windows: Sequence[tuple[int, list[int], int]]) -> NDArray[np.float64]:
    result = np.zeros(len(windows))
    for batch in _batches(windows, scorer.context_tokens):
        for (index, _, _), nats in zip(batch, _window_nats(scorer, batch), strict=True):
            result[index] = nats
    return result


def _batches(
    windows: Sequence[tuple[int, list[int], int]], context_tokens: int
) -> Iterator[Sequence[tuple[int, list[int], int]]]:
    # windows of like length together, so that little is padding
    ordered = sorted(windows, key=lambda window: len(window[1]), reverse=True)
    size = max(1, TOKENS_A_BATCH // context_tokens)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _window_nats(scorer: Scorer, batch: Sequence[tuple[int, list[int], int]]) -> list[float]:
    """Summed nats of each window's tokens that are not given. Padding is to the right, where causality
    hides it.
    """
    longest = max(len(tokens) for _, tokens, _ in batch)
    ids_WC = torch.full((len(batch), longest), scorer.start_token)
    wanted_WC = torch.zeros((len(batch), longest - 1), dtype=torch.bool)
    for w, (_, tokens, given) in enumerate(batch):
        ids_WC[w, : len(tokens)] = torch.tensor(tokens)
        wanted_WC[w, given - 1 : len(tokens) - 1] = True
    device = next(scorer.model.parameters()).device
    ids_WC = ids_WC.to(device)
    with torch.inference_mode():
        logits_WCV = scorer.model(input_ids=ids_WC[:, :-1], use_cache=False).logits.float()
        nats_WC = torch.nn.functional.cross_entropy(
            logits_WCV.flatten(0, 1), ids_WC[:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)
    wanted_nats_WC = torch.where(wanted_WC.to(device), nats_WC, 0.0).double()
    return [float(nats) for nats in wanted_nats_WC.sum(dim=1)]
