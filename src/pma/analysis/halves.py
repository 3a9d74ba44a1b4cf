"""A text in two halves that share no document: one to choose by, one to report on."""

# D documents

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from pma.errors import InputError
from pma.evaluation.text import Document

FEWEST_DOCUMENTS = 4
#: what tells documents apart; of a text that is too long, so much of each is kept at least
_BEGINNING_CHARACTERS = 1_000


@dataclass(frozen=True, kw_only=True)
class Halves:
    """`documents`: what is read of the text, in the order of their digests. `chooses_D`: whether a document
    is of the half to choose by. `given`: how many documents the text has. `cut_characters`: each is cut
    after so many; None where none is.
    """

    documents: tuple[Document, ...]
    chooses_D: NDArray[np.bool_]
    given: int
    cut_characters: int | None

    def half(self, *, chooses: bool) -> tuple[Document, ...]:
        """The documents of one half."""
        return tuple(d for d, c in zip(self.documents, self.chooses_D, strict=True) if c == chooses)


def halve(documents: Sequence[Document], *, most_characters: int) -> Halves:
    """Two halves of equally many documents, drawn by digests of their beginnings: the same text gives the
    same halves, and documents that begin alike, or are of one group, are of one half. Where the text is
    longer than `most_characters`, the beginnings of its documents, equally long; and of very many documents
    only some.

    Raises InputError where there are too few different documents.
    """
    ordered = sorted(documents, key=lambda document: (_beginning(document), document.text))
    # as many as the text may be long if each is read so far
    read_D = np.cumsum([min(len(document.text), _BEGINNING_CHARACTERS) for document in ordered])
    kept = ordered[: max(FEWEST_DOCUMENTS, int((read_D <= most_characters).sum()))]
    digests = [_beginning(document) for document in kept]
    # each half has two documents or more, or there would be no standard error
    between = [d for d in range(2, len(kept) - 1) if digests[d - 1] != digests[d]]
    if len(set(digests)) < FEWEST_DOCUMENTS or not between:
        raise InputError(
            f"the text has {len(set(digests))} different documents, expected at least {FEWEST_DOCUMENTS}: "
            "one half is to choose by, the other to report on. Give more text, or part it by lines "
            "<|endoftext|>"
        )
    middle = min(between, key=lambda d: abs(2 * d - len(kept)))
    cut = _equal_length([len(document.text) for document in kept], most_characters)
    return Halves(
        documents=tuple(Document(name=d.name, text=d.text[:cut], group=d.group) for d in kept),
        chooses_D=np.arange(len(kept)) < middle,
        given=len(documents),
        cut_characters=cut,
    )


def _beginning(document: Document) -> bytes:
    what = document.group or document.text[:_BEGINNING_CHARACTERS]
    return blake3(what.encode()).digest()


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
