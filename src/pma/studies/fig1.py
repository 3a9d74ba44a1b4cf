"""Figure 1: merging in the stable phase, mixtures of experts."""

from __future__ import annotations

from typing import Any

from pma.studies import stable_phase
from pma.studies.lab import Lab
from pma.studies.presets import MIXTURE
from pma.studies.stable_phase import draw
from pma.studies.telling import Told

__all__ = ["VERSION", "draw", "run", "tell"]
VERSION = 1


def run(lab: Lab) -> dict[str, Any]:
    """Raw and merged mixtures."""
    return stable_phase.run(lab, MIXTURE)


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    return stable_phase.tell(results, "mixtures of experts")
