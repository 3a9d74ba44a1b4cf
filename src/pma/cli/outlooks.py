"""`pma forecast RUN`: the part of `pma forecast` that evaluates merges of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma import engine, verbs
from pma.cli.output import note, say, table
from pma.errors import UsageError, printable
from pma.quantities import bytes_text, parse_tokens
from pma.results import Store
from pma.trajectory import TrajectoryPoint, resolve

if TYPE_CHECKING:
    from pma.annealing import RunOutlook
    from pma.forecast.calibration import Calibration, Decay
    from pma.forecast.outlook import Outlook

LENGTHS = (0.25, 0.5, 2.0, 4.0)
_FEW_DOCUMENTS = 10


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, as flags have it. `annealed`: decays of the run that were carried out."""

    run: Path
    text: Sequence[Path]
    anneal: str
    steps: int | None
    tokens: str | None
    batch: str | None
    from_step: int | None
    floor: float
    annealed: Sequence[Path]
    probe: bool
    calibration: str
    store: Path | None
    context: int | None
    seed: int


def forecast_run(asked: Asked, out: Path | None, *, as_json: bool) -> dict[str, Any]:
    """Evaluate what is not in the store yet, forecast, print and draw."""
    from pma import annealing, sweeping
    from pma.annealing import Bench
    from pma.evaluation.measures import text_measure
    from pma.forecast.calibration import named

    calibration = named(asked.calibration)
    found = resolve([asked.run])
    points, notes = annealing.constant_points(found)
    from_step = asked.from_step or int(points[-1].step or 0)
    decay = _decay(asked, annealing.tokens_a_step(found))
    documents = verbs.held_out_documents(asked.text, asked.run)
    if len(documents) < _FEW_DOCUMENTS:
        notes.append(f"only {len(documents)} held-out documents: losses on so few are rough")
    for text in notes:
        note(printable(text, 400))
    with Store(asked.store or sweeping.store_beside(asked.run)) as store:
        measure = text_measure(documents, cloze=0, context_tokens=asked.context)
        bench = Bench(
            measure=measure, store=store, context_tokens=asked.context, announce=note, new=_announce
        )
        known = list(asked.annealed)
        if asked.probe:
            known.append(_probe(points, from_step, decay))
        made = annealing.forecast_run(
            points, from_step, decay, calibration, bench, known_paths=known, lengths=LENGTHS, seed=asked.seed
        )
    result = _described(made, decay, calibration, notes)
    if not as_json:
        _show(made, decay, calibration)
    if out is not None:
        _draw(out, made)
        if not as_json:
            say(f"\nChart: {out}")
    return {**result, "chart": str(out) if out is not None else None}


def _decay(asked: Asked, tokens_a_step: float | None) -> Decay:
    from pma.forecast.calibration import Decay

    if not asked.anneal:
        raise UsageError("which decay of the run? Such as: --anneal cosine --tokens 250M")
    if (asked.steps is None) == (asked.tokens is None):
        raise UsageError("how long is the decay? Give --steps or --tokens")
    steps = asked.steps
    if asked.tokens is not None:
        batch = tokens_a_step if asked.batch is None else float(parse_tokens(asked.batch))
        if batch is None:
            raise UsageError(
                "--tokens: the run does not count its tokens; say with --batch how many are a step, or give "
                "--steps"
            )
        steps = round(parse_tokens(asked.tokens) / batch)
        if steps < 1:
            raise UsageError(f"--tokens {asked.tokens} is less than a step of {batch:,.0f} tokens")
    assert steps is not None
    return Decay(shape=asked.anneal, steps=steps, floor=asked.floor)


def _announce(missing: Sequence[engine.Plan]) -> None:
    if missing:
        read = engine.bytes_to_read_by(missing, engine.passes(missing, in_memory=True))
        note(f"{len(missing)} models are not evaluated yet; reading {bytes_text(read)}")


def _probe(points: Sequence[TrajectoryPoint], from_step: int, decay: Decay) -> Path:
    """The folder of a short decay of the run. Raises UsageError with what to do where it is not ours."""
    from pma import annealing
    from pma.cli.training import training_bar

    annealing.windows_of(points, from_step)  # refuses before anything is trained
    point = next(point for point in points if point.step == from_step)
    steps = annealing.probe_steps(from_step, decay)
    note(f"probe: a {decay.shape} decay of {steps} steps from step {from_step}")
    with training_bar("probe") as bar:
        made = annealing.run_probe(point, decay, bar)
    if made is None:
        raise UsageError(
            f"--probe trains, and {point.path.parent} is another trainer's run. With that trainer, go on "
            f"from {point.path} with its optimizer's state and data, let the learning rate fall to 0 "
            f"({decay.shape}) within {steps} steps, and save a checkpoint there; then give its folder: "
            "--annealed FOLDER"
        )
    return made


def _described(
    made: RunOutlook, decay: Decay, calibration: Calibration, notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "decay": asdict(decay),
        **_outlook(made.asked),
        "lengths": [_outlook(each) for each in made.lengths],
        "probes": [{"steps": list(p.steps), "loss": p.loss, "error": p.error} for p in made.probes],
        "annealed": [
            {"from_step": case.from_step, "steps": len(case.shares_T), "loss": case.loss}
            for case in made.known
        ],
        "calibration": calibration.to_json(),
        "notes": list(notes),
    }


def _outlook(each: Outlook) -> dict[str, Any]:
    return {
        "from_step": each.from_step,
        "steps": each.steps,
        "loss": each.loss,
        "told": each.told,
        "interval80": list(each.intervals[0.80]),
        "interval95": list(each.intervals[0.95]),
        "gain": each.gain,
        "gain_interval95": list(each.gain_interval),
        "at_constant_rate": each.at_rate,
        "moved_by_annealed": each.moved_by,
        "widened": [{"why": why, "factor": factor} for why, factor in each.widened],
    }


def _show(made: RunOutlook, decay: Decay, calibration: Calibration) -> None:
    asked = made.asked
    raw, best = made.probes[0].loss, _best_merge(made)
    say(f"{decay.shape} decay of {decay.steps} steps from step {asked.from_step}")
    if not asked.told:
        say(f"These merges do not tell what it gives: the 95% interval, {_range(asked.intervals[0.95])},")
        say("is wider than the gain. A decay of the run itself would tell: --probe, or --annealed FOLDER.")
    else:
        say(f"expected held-out loss at step {asked.from_step + asked.steps}: {asked.loss:.4f}")
        say(f"  80%: {_range(asked.intervals[0.80])}   95%: {_range(asked.intervals[0.95])}")
        say(
            f"  annealing gives {asked.gain:.4f} (95%: {_range(asked.gain_interval)}) over the raw loss there"
        )
    say(f"  now: {raw:.4f} raw; {best:.4f} the best merge, free")
    say(f"  as many more steps at the constant rate: {asked.at_rate:.4f} raw")
    for case in made.known:
        say(f"  its own decay of {len(case.shares_T)} steps from step {case.from_step} gave {case.loss:.4f}")
    if made.known:
        say(f"  which moves this forecast by {asked.moved_by:+.4f}")
    for why, _ in asked.widened:
        note(f"{why}. The intervals are widened for it")
    note(
        f"calibration {calibration.name}: {calibration.what}. Of other sizes and recipes it knows nothing; a "
        "decay of the run itself (--annealed) tells how far it holds"
    )
    say()
    columns = ("steps", "ends at", "loss", "80%", "95%", "at constant rate")
    shown = sorted([asked, *made.lengths], key=lambda each: each.steps)
    table(columns, [_line(each) for each in shown])


def _best_merge(made: RunOutlook) -> float:
    """Of those that end where the decay starts."""
    end = made.asked.from_step
    return min(probe.loss for probe in made.probes if len(probe.steps) > 1 and probe.steps[-1] == end)


def _line(each: Outlook) -> tuple[str, ...]:
    loss = f"{each.loss:.4f}" if each.told else "not told"
    ranges = (_range(each.intervals[0.80]), _range(each.intervals[0.95]))
    return (str(each.steps), str(each.from_step + each.steps), loss, *ranges, f"{each.at_rate:.4f}")


def _range(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def _draw(out: Path, made: RunOutlook) -> None:
    from pma.reporting.forecast_chart import outlook_chart, write_forecast_chart

    models = [
        {
            "step": probe.steps[-1],
            "loss": probe.loss,
            "name": "raw checkpoint" if len(probe.steps) == 1 else "merge",
            "checkpoints": len(probe.steps),
        }
        for probe in made.probes
    ]
    known = [
        {"step": case.from_step + len(case.shares_T), "loss": case.loss, "name": "annealed", "checkpoints": 1}
        for case in made.known
    ]
    expected = [
        {
            "step": each.from_step + each.steps,
            "loss": each.loss,
            **{
                f"{side}{round(100 * level)}": bound
                for level, bounds in each.intervals.items()
                for side, bound in zip(("low", "high"), bounds, strict=True)
            },
        }
        for each in sorted([made.asked, *made.lengths], key=lambda each: each.steps)
        if each.told
    ]
    chart = outlook_chart([*models, *known], expected)
    lead = f"Expected loss after the decay: {made.asked.loss:.4f} (95%: {_range(made.asked.intervals[0.95])})"
    write_forecast_chart(
        chart, out, lead if made.asked.told else "These merges do not tell what the decay gives"
    )
