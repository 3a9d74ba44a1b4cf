"""The fine-tuning runs that two studies share: cosines from three peak rates, of which one is chosen on
validation responses, and the chosen one held constant; from either start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pma.studies.lab import VALIDATION, Lab
from pma.studies.making import Made, Trunk
from pma.studies.measuring import Measured
from pma.studies.stages import LAST, MERGE, Schedule, Stage, StageText, constant, stage
from pma.studies.tuning import trunks, tuned

# of the trunk's tuned rate; the paper fine-tunes at about a tenth of its peak
PEAKS = (1.0, 0.3, 0.1)


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The runs by schedule and start, one for each seed, and how the peak was chosen: `best` is the cosine
    from it, `steady` the constant rate.
    """

    size: str
    trunk_rate: float
    rows: tuple[dict[str, Any], ...]
    best: Schedule
    steady: Schedule
    schedules: tuple[Schedule, ...]
    runs: dict[tuple[str, str], list[Stage]]

    @property
    def text(self) -> Made:
        """The rows, split."""
        return self._one.text

    @property
    def trunk_text(self) -> Made:
        """What the trunk was trained on, split."""
        return self._one.text.needs()[0]

    @property
    def _one(self) -> Stage:
        return next(iter(self.runs.values()))[0]

    def of(self, schedule: Schedule, start: str) -> list[Stage]:
        """The runs of a schedule from a start, by seed."""
        return self.runs[schedule.name, start]


def chosen(lab: Lab) -> FineTuning:
    """All runs, made. The peak is that which gives last the lowest loss on validation responses, of the first
    seed.
    """
    size = lab.preset.size(lab.preset.middle[0])
    rate = tuned(lab, (size,))[size.name].rate
    by_seed = trunks(lab, size)
    first = by_seed[lab.seeds[0]]
    cosines = tuple(_cosine(rate * share) for share in PEAKS)
    runs = _runs(lab, by_seed, cosines)
    tried = [run for several in runs.values() for run in several if run.trunk == first]
    ends = [Measured(run=each, at=each.steps) for each in tried]
    losses = [reading.text.loss.value for reading in lab.measure(ends, where=VALIDATION)]
    by_run = dict(zip(runs, losses, strict=True))
    rows = [
        {"peak": each.peak, **{start: by_run[each.name, start] for start in (LAST, MERGE)}}
        for each in cosines
    ]
    best = min(cosines, key=lambda each: by_run[each.name, LAST])
    steady = constant(f"{best.peak:.2g}, constant", best.peak)
    return FineTuning(
        size=size.name,
        trunk_rate=rate,
        rows=tuple(rows),
        best=best,
        steady=steady,
        schedules=(*cosines, steady),
        runs={**runs, **_runs(lab, by_seed, (steady,))},
    )


def _runs(
    lab: Lab, by_seed: dict[int, Trunk], schedules: Sequence[Schedule]
) -> dict[tuple[str, str], list[Stage]]:
    """Made, by schedule and start, one for each seed."""
    runs = {
        (schedule.name, start): [_stage(lab, trunk, start, schedule) for trunk in by_seed.values()]
        for schedule in schedules
        for start in (LAST, MERGE)
    }
    lab.make([each for several in runs.values() for each in several])
    return runs


def _cosine(peak: float) -> Schedule:
    return Schedule(name=f"{peak:.2g} → {peak / 10:.2g}", peak=peak, final=peak / 10)


def _stage(lab: Lab, trunk: Trunk, start: str, schedule: Schedule) -> Stage:
    text = StageText(trunk=trunk, text=lab.data.instructions, instructions=True)
    return stage(lab, trunk, start, text, schedule)
