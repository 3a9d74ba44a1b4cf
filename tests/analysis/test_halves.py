"""Halves of a text: nothing is in both, and the same text is always parted alike."""

import random

import pytest

from pma.analysis.halves import halve
from pma.errors import InputError
from pma.evaluation.text import Document


def documents(*texts: str) -> list[Document]:
    return [Document(name=f"d{number}", text=text) for number, text in enumerate(texts)]


def test_halves_share_nothing_and_leave_nothing_out():
    given = documents(*(f"document {number} " * 5 for number in range(31)))
    halves = halve(given, most_characters=10**6)
    first, second = halves.half(chooses=True), halves.half(chooses=False)
    assert not {d.text for d in first} & {d.text for d in second}
    assert sorted(d.name for d in (*first, *second)) == sorted(d.name for d in given)
    assert (len(first), len(second)) in ((15, 16), (16, 15))
    assert (halves.given, halves.cut_characters) == (31, None)


def test_the_order_of_documents_does_not_matter():
    given = documents(*(f"document {number}" for number in range(20)))
    shuffled = random.Random(0).sample(given, len(given))
    one, other = halve(given, most_characters=10**6), halve(shuffled, most_characters=10**6)
    assert one.documents == other.documents


@pytest.mark.parametrize("copies", [2, 5, 40])
def test_documents_that_begin_alike_are_of_one_half(copies):
    licence = "the same thousand characters " * 40
    texts = [*(licence + str(number) for number in range(copies)), "a", "b", "c", "d"]
    halves = halve(documents(*texts), most_characters=10**6)
    of_licence = {bool(c) for d, c in zip(halves.documents, halves.chooses_D, strict=True) if len(d.text) > 1}
    assert len(of_licence) == 1
    assert all(len(halves.half(chooses=chooses)) >= 2 for chooses in (True, False))


def test_of_a_long_text_documents_are_cut_to_equal_length():
    texts = [str(number) * length for number, length in enumerate([100, 3_000, 9_000, 5_000, 50])]
    halves = halve(documents(*texts), most_characters=8_150)
    # 150 characters are short documents', the rest is for three
    assert halves.cut_characters == (8_150 - 150) // 3
    assert sorted(len(d.text) for d in halves.documents) == [50, 100, 2_666, 2_666, 2_666]


def test_of_very_many_documents_some_are_read():
    halves = halve(documents(*(f"{number:04}" * 500 for number in range(300))), most_characters=50_000)
    assert len(halves.documents) == 50
    assert halves.given == 300
    assert sum(len(d.text) for d in halves.documents) <= 50_000
    short = halve(documents(*(f"{number:04}" for number in range(300))), most_characters=800)
    assert (len(short.documents), short.cut_characters) == (200, None)
    assert len(halve(short.documents, most_characters=800).documents) == 200


@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c"], ["a"] * 50, ["a"] * 20 + ["b"] * 20])
def test_too_few_different_documents_are_refused(texts):
    with pytest.raises(InputError, match=r"different documents, expected at least 4: one half is to choose"):
        halve(documents(*texts), most_characters=10**6)
