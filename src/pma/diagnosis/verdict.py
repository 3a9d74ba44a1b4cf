"""Merge, wait, or not here: the window that is predicted to gain most, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from pma.diagnosis.prediction import Predicted


class Verdict(Enum):
    """What to do with the run as it is now."""

    MERGE = "merge"
    WAIT = "wait"
    NOT_HERE = "not here"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A window: the newest `last` checkpoints, `every` steps apart; None where checkpoints lie unevenly."""

    last: int
    every: int | None
    predicted: Predicted

    @property
    def flags(self) -> str:
        """As `pma merge` takes it."""
        return f"--last {self.last}" + ("" if self.every is None else f" --every {self.every}")


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The verdict, why (sentences), and the windows considered, that with the highest gain first."""

    verdict: Verdict
    reasons: tuple[str, ...]
    windows: tuple[Candidate, ...] = ()

    @property
    def to_merge(self) -> bool:
        """Whether the first of `windows` is advised."""
        return self.verdict is Verdict.MERGE

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        described = [_described(each) for each in self.windows]
        return {
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            "window": described[0] if self.to_merge else None,
            "windows": described,
        }


def _described(window: Candidate) -> Mapping[str, Any]:
    return {"last": window.last, "every": window.every, **asdict(window.predicted)}


def strides(count: int) -> Iterator[tuple[int, int]]:
    """(N, checkpoints apart) of every window of at least two of `count` checkpoints that ends with the
    newest.
    """
    for apart in range(1, count):
        for last in range(2, (count - 1) // apart + 2):
            yield last, apart


def judged(windows: Sequence[Candidate], *, decaying: bool, rate_share: float) -> Advice:
    """The verdict on windows of one phase. `decaying`: the rate is being lowered; `rate_share` of its peak it
    has come to.
    """
    ranked = tuple(sorted(windows, key=lambda window: -window.predicted.gain))
    best = ranked[0].predicted
    worth = f"noise worth {best.noise:.3f} nats averages out and lagging behind costs {best.cost:.3f}"
    come = f"the rate has come down to {100 * rate_share:.0f}% of its peak"
    if best.gain > best.error:
        reason = f"{worth}: the merge should be {best.gain:.3f} ± {best.error:.3f} nats a token below last"
        more = (f"{come}; the further a decay has come, the less is left for a merge to gain",) * decaying
        return Advice(verdict=Verdict.MERGE, reasons=(reason, *more), windows=ranked)
    reason = f"even in the best window, {ranked[0].flags}, {worth}, not sure by its error of {best.error:.3f}"
    if decaying:
        reasons = (
            f"{come}, which removes the noise that a merge would remove",
            reason,
            "merge checkpoints from before the decay, or take the newest as it is",
        )
        return Advice(verdict=Verdict.NOT_HERE, reasons=reasons, windows=ranked)
    if best.noise > best.cost:
        why, then = "a gain is not sure yet", "more checkpoints, or a higher rate, leave more to average out"
    else:
        why = "the run still travels faster than noise moves it"
        then = "the loss falls more slowly later, and a merge will gain; or save checkpoints closer together"
    return Advice(verdict=Verdict.WAIT, reasons=(why, reason, then), windows=ranked)
