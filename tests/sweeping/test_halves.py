"""A text in two halves that share no document."""

import random

import pytest

from pma.errors import InputError
from pma.evaluation.text import Document
from pma.sweeping.halves import MOST_PARTS, halved


def documents(count: int, **more: str) -> list[Document]:
    return [Document(name=str(n), text=f"document {n}", **more) for n in range(count)]


@pytest.mark.parametrize("count", [8, 9, 13, 63, 64, 500])
def test_no_document_is_in_both_and_none_is_lost(count: int) -> None:
    given = documents(count)
    halves = halved(given)
    selection, report = ({d.name for d in half} for half in (halves.selection, halves.report))
    assert not selection & report
    assert len(selection | report) == count
    assert abs(len(halves.selection) - len(halves.report)) <= 1
    assert len(halves.parts) == min(MOST_PARTS, count // 2 // 2)
    sizes = [len(part) for part in halves.parts]
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    in_report = sum(len(d.text.encode()) for d in halves.report) / sum(len(d.text.encode()) for d in given)
    assert halves.shares.report == pytest.approx(in_report)
    assert sum(halves.shares.parts) == pytest.approx(1 - in_report)


def test_order_and_names_do_not_matter_and_the_seed_does() -> None:
    given = documents(40)
    shuffled = [Document(name="other", text=d.text) for d in random.Random(1).sample(given, 40)]
    first, again, other = halved(given), halved(shuffled), halved(given, seed=1)
    assert [d.text for d in first.selection] == [d.text for d in again.selection]
    assert {d.text for d in first.selection} != {d.text for d in other.selection}


def test_equal_documents_and_groups_are_not_parted() -> None:
    twins = [d for d in documents(20) for _ in range(2)]
    halves = halved(twins)
    assert not {d.text for d in halves.selection} & {d.text for d in halves.report}
    books = [
        Document(name=f"{b} {p}", text=f"page {p} of {b}", group=f"book {b}")
        for b in range(9)
        for p in range(3)
    ]
    halves = halved(books)
    assert not {d.group for d in halves.selection} & {d.group for d in halves.report}
    assert len(halves.selection) + len(halves.report) == 27


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (documents(7), "the text has 7 documents; a search chooses"),
        (documents(1) * 30, "30 documents, 1 of them distinct"),
        (documents(20, group="one"), "1 of them distinct"),
    ],
)
def test_too_few(given: list[Document], words: str) -> None:
    with pytest.raises(InputError, match=words):
        halved(given)
