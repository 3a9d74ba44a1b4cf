"""How a run of `pma pretrain` can start, and which flags go with each start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pma.errors import UsageError

_TAKEN = {
    "": ("RECIPE", "--text", "--tokens", "--learning-rate", "--seed", "--no-interval-means"),
    "--fork-from": ("--anneal", "--tokens", "--seed"),
    "--resume-from": ("--tokens", "--skip-steps", "--skip-tokens"),
    "--start-from": (
        *("--text", "--instructions", "--tokens", "--epochs", "--learning-rate", "--final-learning-rate"),
        *("--warmup-steps", "--schedule", "--checkpoint-every", "--seed", "--no-interval-means"),
    ),
}
_WHY = {
    "": "it goes with {flags}",
    "--fork-from": "a fork keeps the recipe, text and peak rate of its run",
    "--resume-from": "a run that goes on keeps recipe, text, rate and seed",
    "--start-from": "a later stage keeps the recipe of its checkpoint's run, and starts anew",
}


def check_flags(starts: Mapping[str, Path | None], given: Sequence[str]) -> None:
    """Raises UsageError for flags that do not go together."""
    chosen = [flag for flag, value in starts.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different starts; say one of them")
    start = chosen[0] if chosen else ""
    for flag in given:
        if flag not in _TAKEN[start]:
            others = " or ".join(name for name in starts if flag in _TAKEN[name])
            why = _WHY[start].format(flags=others)
            raise UsageError(f"{flag} does not go with {start or 'a run from the beginning'}: {why}")
    if not start and "RECIPE" not in given:
        raise UsageError("which recipe? Such as: pma pretrain nano-dense -o run")
