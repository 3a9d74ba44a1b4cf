"""Fixed windows of tokens: the same text for every model that is looked at."""

# W windows, C context length in tokens, D documents, B batches

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.errors import InputError

SHORTEST_CONTEXT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """`ids_WC`: C + 1 tokens a window, of which the last C are predicted. `document_W`: whose each is."""

    ids_WC: NDArray[np.int64]
    document_W: NDArray[np.int64]

    def batches(self, count: int) -> list[TokenWindows]:
        """About `count` parts, of like size, that share no document."""
        documents = np.unique(self.document_W)
        parts = np.array_split(documents, min(count, len(documents)))
        chosen = [np.isin(self.document_W, part) for part in parts]
        return [TokenWindows(ids_WC=self.ids_WC[c], document_W=self.document_W[c]) for c in chosen]


def fitting(documents: Sequence[Sequence[int]], *, context_tokens: int, tokens: int) -> TokenWindows:
    """Windows with about `tokens` tokens together, or as many as there are. `context_tokens`: their length;
    halved, down to `SHORTEST_CONTEXT_TOKENS`, where documents are so short that fewer than half of the tokens
    could be had otherwise.

    Raises InputError where two documents have no window.
    """
    context = context_tokens
    while context >= SHORTEST_CONTEXT_TOKENS:
        there_D = [len(document) // (context + 1) for document in documents]
        few = sum(there_D) * context < min(tokens, sum(map(len, documents))) / 2
        if sum(map(bool, there_D)) >= 2 and not (few and context // 2 >= SHORTEST_CONTEXT_TOKENS):
            count = min(sum(there_D), max(2, tokens // context))
            return cut(documents, context_tokens=context, windows=count)
        context //= 2
    raise InputError(
        f"{len(documents)} documents have no windows of {SHORTEST_CONTEXT_TOKENS} tokens, expected two that "
        "do; give longer documents"
    )


def cut(
    documents: Sequence[Sequence[int]], *, context_tokens: int, windows: int, seed: int = 0
) -> TokenWindows:
    """`windows` windows that do not overlap, one from each document in turn, at places drawn at random.
    `documents`: token ids of each.

    Raises InputError where there are too few tokens.
    """
    draw = random.Random(seed)
    length = context_tokens + 1
    starts = [list(range(0, len(tokens) - length + 1, length)) for tokens in documents]
    for places in starts:
        draw.shuffle(places)
    order = [d for d in range(len(documents)) if starts[d]]
    draw.shuffle(order)
    picked: list[tuple[int, int]] = []
    for turn in range(max(map(len, starts), default=0)):
        picked += [(d, starts[d][turn]) for d in order if turn < len(starts[d])]
    if len(picked) < windows:
        raise InputError(
            f"the text has {len(picked)} windows of {length} tokens, expected {windows}; give more text"
        )
    picked = sorted(picked[:windows])
    ids = [list(documents[d][start : start + length]) for d, start in picked]
    return TokenWindows(ids_WC=np.array(ids, dtype=np.int64), document_W=np.array([d for d, _ in picked]))
