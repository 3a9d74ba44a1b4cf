"""A text in two halves, one to choose by and one to report on, the first of them cut into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pma.errors import InputError
from pma.evaluation.text import Document, inseparable

#: parts of the half to choose by, where it has enough documents
MOST_PARTS = 16
# two a part and two parts, or there is nothing to halve; and as many to report on
_FEWEST_DOCUMENTS = 8

Documents = tuple[Document, ...]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of the text each part is, and the half that is reported on; together 1."""

    parts: tuple[float, ...]
    report: float

    @classmethod
    def of(cls, parts: Sequence[int], report: int) -> Shares:
        """From their sizes."""
        whole = sum(parts) + report
        return cls(parts=tuple(part / whole for part in parts), report=report / whole)


@dataclass(frozen=True, kw_only=True)
class Halves:
    """`parts`: the half to choose by, in the order in which it is read. `report`: the half that is never
    chosen by. No document of one is in the other.
    """

    parts: tuple[Documents, ...]
    report: Documents

    @property
    def selection(self) -> Documents:
        """The half to choose by, whole."""
        return tuple(document for part in self.parts for document in part)

    @property
    def shares(self) -> Shares:
        """By bytes."""
        return Shares.of([*map(_bytes, self.parts)], _bytes(self.report))


def _bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode("utf-8")) for document in documents)


def halved(documents: Sequence[Document], *, seed: int = 0) -> Halves:
    """Halves of about as many documents. The same for the same documents and seed, in whatever order they
    come.

    Documents of one group stay together, and so do equal ones. Raises InputError where there are too few.
    """
    units = inseparable(documents, seed=seed)
    if len(units) < _FEWEST_DOCUMENTS:
        distinct = "" if len(units) == len(documents) else f", {len(units)} of them distinct"
        raise InputError(
            f"the text has {len(documents)} documents{distinct}; a search chooses on one half and reports on "
            f"the other, and needs at least {_FEWEST_DOCUMENTS}. Give more text, cut it into documents with "
            "lines <|endoftext|>, or sweep without --search"
        )
    report, selection = units[0::2], units[1::2]
    count = min(MOST_PARTS, len(selection) // 2)
    parts = tuple(_together(selection[part::count]) for part in range(count))
    return Halves(parts=parts, report=_together(report))


def _together(units: Sequence[Documents]) -> Documents:
    return tuple(document for unit in units for document in unit)
