"""How much a look may cost, and under which keys looks are kept in a store of results, so that none is taken
twice and reports find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from blake3 import blake3

from pma import __version__
from pma.evaluation.text import Document
from pma.results import content_key

#: the evaluation's key of all looks: a report asks for it alone
LOOKS = content_key("looks around merges, 1")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What bounds the cost of a look: how much of the text is read for losses, and how many tokens for
    routing, derivatives and the plane, in windows of at most `context_tokens`; `plane_points` a side.
    """

    text_characters: int = 400_000
    routing_tokens: int = 16_384
    derivative_tokens: int = 8_192
    plane_tokens: int = 4_096
    context_tokens: int = 512
    batches: int = 16
    plane_points: int = 13


def look_key(
    merge_key: str, documents: Sequence[Document], budget: Budget, *, context_tokens: int | None = None
) -> str:
    """Tells looks apart: by what is merged, the text, and how much of it is read."""
    return content_key(
        {
            "merge": merge_key,
            "texts": [blake3(document.text.encode()).hexdigest() for document in documents],
            "budget": asdict(budget),
            "context_tokens": context_tokens,
            "pma": __version__,
        }
    )
