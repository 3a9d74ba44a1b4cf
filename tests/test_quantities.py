"""Sizes and counts as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma.errors import UsageError
from pma.quantities import (
    Steps,
    Tokens,
    bytes_text,
    count_text,
    distance_flag,
    parse_bytes,
    parse_distance,
    parse_rate,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8B", 8e9),
        ("250M", 250e6),
        ("1.5k", 1500),
        ("1.2T", 1.2e12),
        ("307200", 307_200),
        ("1,500", 1500),
        (".5K", 500),
    ],
)
def test_tokens(text: str, count: float) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["8Q", "", "B", "-5M", "1.2.3M", "1e6", "8B8", "1.5", "nan", "٣M"])
def test_tokens_that_are_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match="250M"):
        parse_tokens(text)


@pytest.mark.parametrize(("text", "count"), [("1.5GB", 1.5e9), ("512MiB", 2**29), ("10", 10), ("2 TB", 2e12)])
def test_bytes(text: str, count: float) -> None:
    assert parse_bytes(text) == count


def test_rates() -> None:
    assert parse_rate("5GB/s") == parse_rate("5 GB / s") == parse_rate("5GB") == 5 * 10**9
    with pytest.raises(UsageError, match="rate '5GB/h' is not understood"):
        parse_rate("5GB/h")


def test_distances() -> None:
    assert parse_distance("8B") == Tokens(8_000_000_000)
    assert parse_distance("400") == parse_distance("400 steps") == Steps(400)
    assert parse_distance("25600tokens") == Tokens(25_600)
    for text in ("8Q", "0", "0B", "-1", "far"):
        with pytest.raises(UsageError):
            parse_distance(text)


@given(st.integers(0, 10**15))
def test_what_is_shown_is_within_half_a_percent(count: int) -> None:
    assert parse_tokens(count_text(count)) == pytest.approx(count, rel=0.0051)


@given(st.integers(1, 10**15))
def test_a_suggested_distance_is_read_as_tokens(count: int) -> None:
    read = parse_distance(distance_flag(Tokens(count)))
    assert isinstance(read, Tokens)
    assert read.count == pytest.approx(count, rel=0.0051)


def test_shown() -> None:
    assert [count_text(n) for n in (0, 999, 1000, 1_536_000, 999_999, 8e9)] == [
        "0",
        "999",
        "1K",
        "1.54M",
        "1M",
        "8B",
    ]
    assert bytes_text(1_500_000_000) == "1.5GB"
