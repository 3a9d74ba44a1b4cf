"""Sizes, token counts and steps, read and written as people do: `8B`, `250M`, `1.5GB`, `400 steps`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from pma.errors import UsageError

_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}
_LONGEST_TEXT = 40
_NUMBER = re.compile(r"\s*(\d+(?:[_,]\d{3})*(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)


@dataclass(frozen=True, order=True)
class Steps:
    """A distance or position in optimizer steps."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} steps"


@dataclass(frozen=True, order=True)
class Tokens:
    """A distance or position in training tokens."""

    count: int

    def __str__(self) -> str:
        return f"{count_text(self.count)} tokens"


def _parse(text: str, units: dict[str, int], what: str, examples: str) -> int:
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_TEXT else None
    if match is None or match[2].upper() not in units:
        raise UsageError(f"{what} {text!r} is not understood: expected a number such as {examples}")
    exact = Decimal(re.sub("[_,]", "", match[1])) * units[match[2].upper()]
    if exact != exact.to_integral_value():
        raise UsageError(f"{what} {text!r} is not a whole number: expected one such as {examples}")
    return int(exact)


def parse_tokens(text: str) -> int:
    """Tokens as people write them, `250M` or `1.5B`; a bare number is that many tokens."""
    plain = re.sub(r"\s*tokens?\s*$", "", text, flags=re.IGNORECASE)
    return _parse(plain, _COUNT, "token count", "250M, 8B or 1.2T")


def parse_bytes(text: str) -> int:
    """Bytes as people write them: `512MiB`, `1.5GB`."""
    return _parse(text, _BYTES, "size", "512MiB or 1.5GB")


def parse_rate(text: str) -> int:
    """Bytes a second as people write them: `5GB/s`, or without `/s`."""
    plain = re.sub(r"\s*/\s*s\s*$", "", text, flags=re.IGNORECASE)
    return _parse(plain, _BYTES, "rate", "5GB/s or 500MiB/s")


def parse_distance(text: str) -> Steps | Tokens:
    """`8B` or `250M` are tokens, `400` or `400steps` are optimizer steps."""
    steps = re.fullmatch(r"\s*(\d{1,18})\s*(?:steps?)?\s*", text, flags=re.IGNORECASE | re.ASCII)
    if steps:
        distance: Steps | Tokens = Steps(int(steps[1]))
    else:
        plain = re.sub(r"\s*tokens?\s*$", "", text, flags=re.IGNORECASE)
        distance = Tokens(_parse(plain, _COUNT, "distance", "8B (tokens) or 400 (steps)"))
    if distance.count <= 0:
        raise UsageError(
            f"distance {text!r} is not positive: expected one such as 8B (tokens) or 400 (steps)"
        )
    return distance


def _scaled(value: float, base: int, names: str, unit: str) -> str:
    exponent = 0
    while abs(value) >= base * 0.9995 and exponent < len(names) - 1:
        value /= base
        exponent += 1
    digits = f"{value:.3g}" if exponent and value < 999.5 else f"{value:.0f}"
    return f"{digits}{names[exponent].strip()}{unit}"


def count_text(count: float) -> str:
    """12_300_000 as `12.3M`: three significant digits."""
    return _scaled(count, 1000, " KMBT", "")


def distance_flag(tokens: Tokens) -> str:
    """A distance in tokens as `parse_distance` reads it back, within half a percent (bare numbers are
    steps).
    """
    text = count_text(tokens.count)
    return text if text[-1].isalpha() else f"{text}tokens"


def bytes_text(count: float) -> str:
    """1_500_000_000 as `1.5GB`: three significant digits, decimal units as disks are sold."""
    return _scaled(count, 1000, " KMGT", "B")
