"""A cloze task from any held-out text: the true continuation among three taken from other documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.errors import InputError
from pma.evaluation.scoring import Scorer, continuation_nats
from pma.evaluation.text import Document

CONTEXT_CHARACTERS = 80
CONTINUATION_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class ClozeItem:
    """A context, four continuations of about one length, and which of them is true. `document`: where it
    is from.
    """

    document: int
    context: str
    choices: tuple[str, ...]
    answer: int


def cloze_items(documents: Sequence[Document], count: int = 400, seed: int = 0) -> list[ClozeItem]:
    """`count` items, the same for the same documents and seed. Raises InputError for fewer than four
    usable documents.
    """
    cut = random.Random(seed)
    needed = 2 * (CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS)
    usable = [d for d, document in enumerate(documents) if len(document.text) >= needed]
    if len(usable) < 4:
        raise InputError(
            f"a cloze task needs four documents of {needed} characters; the text has {len(usable)}"
        )
    items = []
    for _ in range(count):
        here, *others = cut.sample(usable, 4)
        context, true = _excerpt(documents[here].text, cut)
        choices = [true]
        for other in others:
            choices.append(_foreign(documents[other].text, choices, cut))
        order = cut.sample(range(4), 4)
        items.append(
            ClozeItem(
                document=here,
                context=context,
                choices=tuple(choices[i] for i in order),
                answer=order.index(0),
            )
        )
    return items


def cloze_correct(scorer: Scorer, items: Sequence[ClozeItem]) -> NDArray[np.bool_]:
    """Whether each item's true continuation has the highest log-likelihood per byte, shape (items,)."""
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    lengths = np.array([len(choice.encode("utf-8")) for _, choice in pairs])
    nats_a_byte = (continuation_nats(scorer, pairs) / lengths).reshape(len(items), -1)
    answers = np.array([item.answer for item in items])
    correct: NDArray[np.bool_] = nats_a_byte.argmin(axis=1) == answers
    return correct


def _foreign(text: str, taken: Sequence[str], cut: random.Random) -> str:
    """A continuation that is none of those `taken`, or no question would be left. Raises InputError where
    there is none.
    """
    for _ in range(100):
        continuation = _excerpt(text, cut)[1]
        if continuation not in taken:
            return continuation
    raise InputError(
        "the held-out documents are too much alike for a cloze task; leave it out with --cloze 0"
    )


def _excerpt(text: str, cut: random.Random) -> tuple[str, str]:
    """A context and its continuation, cut before a white space where one is near."""
    middle = cut.randrange(CONTEXT_CHARACTERS, len(text) - CONTINUATION_CHARACTERS)
    for back in range(20):
        if text[middle - back].isspace() and not text[middle - back - 1].isspace():
            middle -= back
            break
    return text[max(0, middle - CONTEXT_CHARACTERS) : middle], text[middle : middle + CONTINUATION_CHARACTERS]
