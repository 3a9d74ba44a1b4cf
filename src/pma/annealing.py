"""What annealing a run would give: its merges are evaluated as probes, known decays of it read, and the
calibrated forecast made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pma import sweeping, trajectory
from pma.engine import MergeOptions, Plan
from pma.errors import InputError
from pma.evaluation.evaluate import Evaluation, loss_difference
from pma.evaluation.making import Load
from pma.evaluation.measures import TEXT, Measure
from pma.forecast.calibration import Calibration, Case, Decay
from pma.forecast.outlook import Outlook, outlook
from pma.forecast.probes import Probe
from pma.forecast.schedules import from_pairs
from pma.forecast.windows import probe_windows
from pma.pretraining import fork, run_folder
from pma.pretraining.train import Progress
from pma.results import Store
from pma.sweeping.evaluating import Asked, evaluate_each
from pma.trajectory import KEPT_FOLDER, Phase, Trajectory, TrajectoryPoint

#: a probe's length, of the steps from the run's beginning to the end of the decay
PROBE_SHARE = 0.05
_SAME_RATE = 1e-6
_FEWEST_LOGGED = 3
# between a decay's first step as its log has it and the checkpoint it started from, of the decay's length
_START_SLACK = 0.1


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How models are evaluated: `measure` is that of a text, results go to `store`; `announce` hears of each.
    `new`: hears of the plans that are not in the store yet. `load`: as for `sweeping.evaluate`.
    """

    measure: Measure
    store: Store
    context_tokens: int | None = None
    announce: Callable[[str], None] = lambda text: None
    new: Callable[[Sequence[Plan]], None] = lambda plans: None
    load: Load | None = None


@dataclass(frozen=True, kw_only=True)
class RunOutlook:
    """`asked`, the same decay at other `lengths`, and the losses they rest on."""

    asked: Outlook
    lengths: tuple[Outlook, ...]
    probes: tuple[Probe, ...]
    known: tuple[Case, ...]


def constant_points(found: Trajectory) -> tuple[list[TrajectoryPoint], list[str]]:
    """The checkpoints of the run's newest constant rate, oldest first, and what was assumed.

    Raises InputError where there are none: merges of a run that decays all along tell nothing here.
    """
    phases = {point.phase for point in found.points}
    if phases == {Phase.UNKNOWN}:
        points = [point for point in found.points if point.step is not None]
        return points, ["the run does not say its learning rates; they are taken for constant"]
    stable = [point for point in found.points if point.phase is Phase.STABLE and point.step is not None]
    if not stable:
        seen = ", ".join(sorted(phase.value for phase in phases))
        raise InputError(
            f"no checkpoint was made at a constant learning rate (phases: {seen}); merges forecast a decay "
            "from a constant rate. From logs alone: pma forecast --curve"
        )
    rate = stable[-1].learning_rate
    points = [point for point in stable if point.learning_rate == rate]
    newest, notes = found.points[-1], []
    if newest.phase is Phase.DECAY:
        notes.append(
            f"the run decays already, to step {newest.step}; forecasts start from step {points[-1].step}"
        )
    return points, notes


def tokens_a_step(found: Trajectory) -> float | None:
    """Tokens a step of the run, where its records count them."""
    counted = [(p.step, p.tokens) for p in found.points if p.step and p.tokens]
    return counted[-1][1] / counted[-1][0] if counted else None


def evidence(points: Sequence[TrajectoryPoint], from_step: int, bench: Bench) -> tuple[Probe, ...]:
    """The losses of the merges, and raw checkpoints, that tell a decay from `from_step`."""
    windows = windows_of(points, from_step)
    evaluations = evaluated(windows, bench)
    return tuple(
        Probe(
            steps=tuple(point.step or 0 for point in window),
            weights=(1 / len(window),) * len(window),
            loss=evaluation.loss.value,
            # all are compared with the raw checkpoint where the decay starts, the first of them
            error=loss_difference(evaluation, evaluations[0]).standard_error,
        )
        for window, evaluation in zip(windows, evaluations, strict=True)
    )


def windows_of(points: Sequence[TrajectoryPoint], from_step: int) -> list[list[TrajectoryPoint]]:
    """The checkpoints of each model that tells a decay from `from_step`. Raises InputError as
    `probe_windows` does.
    """
    by_step = {point.step: point for point in points if point.step is not None}
    return [[by_step[step] for step in window] for window in probe_windows(list(by_step), from_step)]


def evaluated(windows: Sequence[Sequence[TrajectoryPoint]], bench: Bench) -> list[Evaluation]:
    """The plain average of each window, evaluated; what the store has is taken from there."""
    with sweeping.planner(MergeOptions()) as plans:
        places = [plans.place(window, "sma") for window in windows]
        asked = [
            Asked(plan=plan, key=key, measures=[bench.measure])
            for plan, key in zip(plans.plans, plans.keys, strict=True)
        ]
        results, _ = evaluate_each(
            asked,
            bench.store,
            context_tokens=bench.context_tokens,
            announce=bench.announce,
            begin=bench.new,
            load=bench.load,
        )
    return [results[place][TEXT] for place in places]


def known_decay(path: Path, points: Sequence[TrajectoryPoint], bench: Bench) -> Case:
    """A decay of the run that was carried out, in `path` (a run, or its checkpoint): where it starts and how
    it falls from its log, what it gave from its newest checkpoint.

    Raises InputError where its log does not tell, or the run has no probes there.
    """
    decayed = trajectory.resolve([path])
    last, rates = decayed.points[-1], decayed.log.learning_rates
    if last.step is None or len(rates) < _FEWEST_LOGGED:
        raise InputError(f"{path} does not say its step or learning rates, so it is no decay to learn from")
    schedule = from_pairs([step for step, _ in rates], [rate for _, rate in rates], where=str(path))
    rates_T = schedule.rates_T[: last.step + 1]
    full = np.flatnonzero(rates_T >= schedule.peak_rate * (1 - _SAME_RATE))
    start = int(full[-1])
    if start >= len(rates_T) - 1:
        raise InputError(f"{path}: the learning rate at step {last.step} has not fallen; expected a decay")
    steps = [point.step for point in points if point.step is not None]
    near = min(steps, key=lambda step: abs(step - start), default=None)
    if near is None or abs(near - start) > _START_SLACK * (last.step - start):
        raise InputError(
            f"{path} decays from step {start}, but the run's checkpoint next to it is of step {near}; "
            "expected a decay that starts at a checkpoint of the run"
        )
    (found,) = evaluated([[last]], bench)
    return Case(
        run="this run",
        group="this run",
        from_step=near,
        probes=evidence(points, near, bench),
        shares_T=rates_T[start + 1 :] / rates_T[start],
        loss=found.loss.value,
    )


def forecast_run(
    points: Sequence[TrajectoryPoint],
    from_step: int,
    decay: Decay,
    calibration: Calibration,
    bench: Bench,
    *,
    known_paths: Sequence[Path] = (),
    lengths: Sequence[float] = (),
    seed: int = 0,
) -> RunOutlook:
    """What `decay` from `from_step` would give, and the same at `lengths` times its length."""
    probes = evidence(points, from_step, bench)
    known = tuple(known_decay(path, points, bench) for path in known_paths)
    scaled = [replace(decay, steps=max(1, round(decay.steps * length))) for length in lengths]
    asked, *others = (
        outlook(probes, from_step, each, calibration, known, seed=seed) for each in (decay, *scaled)
    )
    return RunOutlook(asked=asked, lengths=tuple(others), probes=probes, known=known)


def probe_steps(from_step: int, decay: Decay) -> int:
    """The length of a short decay that is worth its cost: a twentieth of the steps up to the decay's end."""
    return max(1, round(PROBE_SHARE * (from_step + decay.steps)))


def run_probe(point: TrajectoryPoint, decay: Decay, progress: Progress | None = None) -> Path | None:
    """Carry out a short decay of the same shape from `point` of a run of ours; its folder, or None where the
    run is another trainer's. A probe that was made before is found again, one that was stopped goes on.
    """
    run = point.path.parent
    if not (run / run_folder.RECORD_FILE).is_file():
        return None
    assert point.step is not None
    recipe = run_folder.read_record(run).recipe
    every = recipe.steps_for(recipe.run.checkpoint_every_tokens)
    steps = -(-probe_steps(point.step, decay) // every) * every  # so that a checkpoint lies at its end
    out = run / KEPT_FOLDER.parent / "probes" / f"{decay.shape}-{point.step}-{steps}"
    fork(point.path, out, anneal=decay.shape, tokens=steps * recipe.tokens_a_step, progress=progress)
    return out
