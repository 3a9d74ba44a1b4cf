"""What a study says, from its numbers alone: set-up, tables, a verdict on each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What the numbers say of a claim."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    CANNOT_TELL = "cannot tell at this size"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim of the paper, as it can be checked here, with the figures that decide."""

    claim: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the write-up: Markdown cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Told:
    """A write-up of one screen. `more`: what would be needed to tell more. `notes`: what else is to know."""

    set_up: str
    tables: Sequence[Table]
    findings: Sequence[Finding]
    more: str
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """In a line: one word where all claims have the same, else how many of each."""
        verdicts = [finding.verdict for finding in self.findings]
        if len(set(verdicts)) == 1:
            return verdicts[0].value
        counts = [(verdict, verdicts.count(verdict)) for verdict in Verdict]
        return ", ".join(f"{count} of {len(verdicts)} {verdict.value}" for verdict, count in counts if count)


def sign_verdict(low: float | None, high: float | None, *, claimed_positive: bool = True) -> Verdict:
    """Of a claim that a quantity is above zero (or below), from its 95% interval; None where an end is not
    known.
    """
    if low is None or high is None:
        return Verdict.CANNOT_TELL
    if not claimed_positive:
        low, high = -high, -low
    if low > 0:
        return Verdict.AGREES
    return Verdict.DISAGREES if high < 0 else Verdict.CANNOT_TELL


def equal_verdict(low: float | None, high: float | None, margin: float) -> Verdict:
    """Of a claim that a quantity is zero, up to `margin`, from its 95% interval."""
    if low is None or high is None:
        return Verdict.CANNOT_TELL
    if -margin < low and high < margin:
        return Verdict.AGREES
    return Verdict.DISAGREES if high < -margin or low > margin else Verdict.CANNOT_TELL


def share_verdict(share: Mapping[str, float] | None, margin: float) -> Verdict:
    """`equal_verdict` of an interval that is undefined where there is nothing to have a share of."""
    return Verdict.CANNOT_TELL if share is None else equal_verdict(share["low"], share["high"], margin)


def not_below_verdict(low: float | None, high: float | None, margin: float) -> Verdict:
    """Of a claim that a quantity is not below zero by more than `margin`, from its 95% interval."""
    if low is None or high is None:
        return Verdict.CANNOT_TELL
    if low > -margin:
        return Verdict.AGREES
    return Verdict.DISAGREES if high < -margin else Verdict.CANNOT_TELL


def most(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim made of several cases: what all of them say; else that it cannot be told, unless one
    contradicts.
    """
    if Verdict.DISAGREES in verdicts:
        return Verdict.DISAGREES
    return Verdict.AGREES if set(verdicts) == {Verdict.AGREES} else Verdict.CANNOT_TELL
