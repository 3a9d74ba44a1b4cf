"""A text in two halves that share no document: one to choose by, one to report on."""

# D documents, U units that stay together

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.errors import InputError
from pma.evaluation.text import Document, inseparable

FEWEST_DOCUMENTS = 4
#: what tells documents apart; and of a text that is too long, so much of each is kept at least
_BEGINNING_CHARACTERS = 1_000


@dataclass(frozen=True, kw_only=True)
class Halves:
    """`documents`: what is read of the text; `chooses_D`: whether a document is of the half to choose by.
    `given`: how many documents the text has. `cut_characters`: each is cut after so many; None where none is.
    """

    documents: tuple[Document, ...]
    chooses_D: NDArray[np.bool_]
    given: int
    cut_characters: int | None

    def half(self, *, chooses: bool) -> tuple[Document, ...]:
        """The documents of one half."""
        return tuple(d for d, c in zip(self.documents, self.chooses_D, strict=True) if c == chooses)


def halve(documents: Sequence[Document], *, most_characters: int) -> Halves:
    """Two halves of about as many documents, the same for the same text; those that begin alike, or are of
    one group, are of one half. Where the text is longer than `most_characters`, the beginnings of its
    documents, equally long; and of very many documents only some.

    Raises InputError where there are too few different documents.
    """
    units = inseparable(documents, beginning_characters=_BEGINNING_CHARACTERS)
    if len(units) < FEWEST_DOCUMENTS:
        raise InputError(
            f"the text has {len(units)} different documents, expected at least {FEWEST_DOCUMENTS}: one half "
            "is to choose by, the other to report on. Give more text, or part it by lines <|endoftext|>"
        )
    # as many as the text may be long if each document is read so far
    read_U = np.cumsum([sum(min(len(d.text), _BEGINNING_CHARACTERS) for d in unit) for unit in units])
    units = units[: max(FEWEST_DOCUMENTS, int((read_U <= most_characters).sum()))]
    kept = [(d, number % 2 == 0) for number, unit in enumerate(units) for d in unit]
    cut = _equal_length([len(document.text) for document, _ in kept], most_characters)
    return Halves(
        documents=tuple(Document(name=d.name, text=d.text[:cut], group=d.group) for d, _ in kept),
        chooses_D=np.array([chooses for _, chooses in kept]),
        given=len(documents),
        cut_characters=cut,
    )


def _equal_length(lengths: Sequence[int], most: int) -> int | None:
    """The length that texts are cut to so that together they have `most` at most; None where they do."""
    if sum(lengths) <= most:
        return None
    left = most
    for number, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - number)
        if length > share:
            return max(share, 1)
        left -= length
    raise AssertionError("the lengths add up to more than the most")
