"""Which of the checkpoints read may go together, what each window of them would gain, and the verdict."""

# M checkpoints that were read, N of a window

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.diagnosis.evidence import Basis
from pma.diagnosis.prediction import calibration, predict
from pma.diagnosis.trend import Shift, share_of_peak, shift
from pma.diagnosis.verdict import Advice, Candidate, Verdict, judged, strides
from pma.logs import Breakaway, Kind, TrainingCurves
from pma.trajectory import Phase, TrajectoryPoint

Floats = NDArray[np.float64]

#: checkpoints of one phase, without a spike among them, from which on windows are judged
FEWEST = 3
_UNEVEN = 0.25  # of the usual distance: windows by --every would not find these checkpoints
_OVER = (Kind.BLIP, Kind.SPIKE)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was read: checkpoints at `steps_M`, inner products of their deviations from the newest, whose
    weights have `length`; and the log.
    """

    points: Sequence[TrajectoryPoint]
    steps_M: Sequence[float]
    deviations_MM: Floats
    length: float
    curves: TrainingCurves
    breakaways: Sequence[Breakaway]


def advise(read: Read) -> Advice:
    """The verdict, from weights, schedule and log."""
    newest, last_step = read.points[-1], read.steps_M[-1]
    if newest.phase is Phase.WARMUP:
        why = "the learning rate is still being raised, and weights of a warmup do not average well"
        return Advice(verdict=Verdict.WAIT, reasons=(why,))
    if (unsettled := _unsettled(read)) is not None:
        return Advice(verdict=Verdict.NOT_HERE, reasons=(unsettled,))
    moved = shift(read.curves, read.steps_M[0], last_step)
    first, notes = _first(read, moved)
    if len(read.points) - first < FEWEST:
        count = len(read.points) - first
        why = f"only {count} checkpoint{'s' * (count > 1)} of one piece; expected at least {FEWEST}"
        return Advice(verdict=Verdict.WAIT, reasons=(*notes, why))
    windows = _windows(read, first)
    if windows is None:
        why = "the log has too few losses up to the newest checkpoint to tell what drift costs (--log)"
        return Advice(verdict=Verdict.CANNOT_TELL, reasons=(why,))
    told = judged(
        windows,
        decaying=newest.phase is Phase.DECAY,
        rate_share=share_of_peak(read.curves, last_step),
    )
    return Advice(verdict=told.verdict, reasons=(*told.reasons, *notes), windows=told.windows)


def _unsettled(read: Read) -> str | None:
    """Why the newest checkpoints are no place to end a window, or None."""
    apart = read.steps_M[-1] - read.steps_M[-2]
    for found in read.breakaways:
        recent = found.kind is Kind.SPIKE and found.last_step > read.steps_M[-1] - apart
        if found.quantity == "loss" and (recent or found.kind not in _OVER):
            before = [p.step for p in read.points if p.step is not None and p.step < found.good_step]
            where = f": end the window before, with --at {before[-1]}" if before else ""
            return f"the loss broke away at step {found.first_step} ({found.kind.words}){where}"
    return None


def _first(read: Read, moved: Shift | None) -> tuple[int, list[str]]:
    """The first checkpoint that may go together with the newest, and why not those before."""
    first, notes = 0, []
    newest = read.points[-1]
    for index in range(len(read.points) - 1, 0, -1):
        before = read.points[index - 1]
        constant = before.phase is newest.phase is Phase.STABLE
        if before.phase is not newest.phase or (constant and before.learning_rate != newest.learning_rate):
            first = index
            notes.append(f"checkpoints up to step {before.step} are of another phase or rate")
            break
    for found in read.breakaways:
        if found.quantity == "loss" and found.kind is Kind.SPIKE:
            after = sum(step <= found.last_step for step in read.steps_M)
            if after > first:
                first = after
                notes.append(f"checkpoints up to the spike at step {found.peak_step} are left out")
    if moved is not None:
        after = sum(step < moved.after_step for step in read.steps_M)
        if after > first:
            first = after
            notes.append(
                f"the loss steps by {moved.nats:+.2f} nats at step {moved.after_step}, perhaps with other "
                "data: checkpoints before are left out"
            )
    return first, notes


def _windows(read: Read, first: int) -> list[Candidate] | None:
    """Every window of the checkpoints from `first` on, with what it would gain; None without a trend."""
    steps = np.asarray(read.steps_M[first:])
    basis = Basis(
        steps_M=read.steps_M[first:],
        deviations_MM=read.deviations_MM[first:, first:],
        weights=read.length,
        curves=read.curves,
        phase_start=read.steps_M[first - 1] if first else 0.0,
    )
    constants = calibration()["without_gradient" if basis.gradient is None else "with_gradient"]
    gaps = np.diff(steps)
    usual = float(np.median(gaps))
    even = bool((np.abs(gaps - usual) <= _UNEVEN * usual).all())
    windows = []
    for last, apart in strides(len(steps)):
        if apart > 1 and not even:
            continue
        found = basis.window(range(len(steps) - 1 - apart * (last - 1), len(steps), apart))
        if found is None:
            return None
        every = round(apart * usual) if even else None
        windows.append(Candidate(last=last, every=every, predicted=predict(found, constants)))
    return windows
