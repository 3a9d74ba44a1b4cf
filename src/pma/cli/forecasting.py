"""`pma forecast`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pma.cli import options as flags
from pma.cli.launching import refuse_repeated
from pma.cli.outlooks import Asked, forecast_run
from pma.cli.output import command, note, say, table
from pma.errors import UsageError, printable
from pma.quantities import parse_tokens
from pma.remote import location

if TYPE_CHECKING:
    from pma.forecast import Forecast, Learned, Request, Target


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(
        "forecast", short_help="What annealing would give, with an interval: from merges, or loss curves."
    )(command(forecast))


def forecast(
    run: Annotated[
        Path | None,
        typer.Argument(
            parser=location, metavar="RUN", help="The run, whose merges are evaluated.", show_default=False
        ),
    ] = None,
    curve: Annotated[
        list[Path] | None,
        typer.Option(
            "--curve",
            metavar="FILE",
            help="Or losses: CSV step,lr,loss or step,loss; a log; a run. Several are fitted together; the "
            "first is the run to be annealed.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        list[Path] | None,
        typer.Option(
            "--schedule", metavar="FILE", help="CSV step,lr of a curve that has no rates, in order."
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--target", metavar="FILE", help="The schedule to forecast, CSV step,lr."),
    ] = None,
    anneal: Annotated[
        str | None, typer.Option("--anneal", help="Or a decay: cosine, linear or 1-sqrt.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Its length.")] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Its length in tokens, such as 250M; with --batch.")
    ] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="Tokens a step, such as 4M.")] = None,
    from_step: Annotated[
        int | None,
        typer.Option("--from", metavar="STEP", min=1, help="Where it starts; by default at the end."),
    ] = None,
    floor: Annotated[float, typer.Option("--floor", help="Where it ends, as a share of the rate.")] = 0.0,
    warmup: Annotated[
        int | None, typer.Option("--warmup", min=0, help="Steps of a linear warmup that the files leave out.")
    ] = None,
    law: Annotated[str, typer.Option("--law", help="multi-power or tissue.")] = "multi-power",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Of a RUN: held-out text; what the run held out by default."),
    ] = None,
    annealed: Annotated[
        list[Path] | None,
        typer.Option(
            "--annealed",
            metavar="FOLDER",
            help="Of a RUN: a decay of it that was carried out, to learn from.",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Of a RUN: carry out a short decay first (5%), and learn from it.")
    ] = False,
    calibration: Annotated[
        str, typer.Option("--calibration", metavar="NAME|FILE", help="Of a RUN: what forecasts were off by.")
    ] = "nano",
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FILE", help="Of a RUN: results; RUN/.pma by default.")
    ] = None,
    context: flags.Context = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of starting points and draws.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="A chart, .png or .html.")
    ] = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """The loss that annealing would give, with an 80% and a 95% interval: of a run from the losses of its
    merges, calibrated on runs that were annealed; or by a law of annealing fitted to loss curves.

    Curves at a constant rate alone do not say what annealing gives: one of them must be annealed, or have a
    drop of the rate. Merges of the run do say it, and its own decays (--annealed, --probe) say it better.

    Example: pma forecast run --anneal cosine --tokens 250M

    Example: pma forecast --curve stable.csv --curve probe.csv --anneal cosine --steps 4000 -o forecast.png

    Example: pma forecast --curve loss.csv --schedule schedule.csv
    """
    from pma.forecast import LAWS, Anneal, forecast_of, learn, request

    if out is not None and out.suffix not in (".png", ".html"):
        raise UsageError(f"-o {out} has another ending than .png or .html; expected one of them")
    _check_mode(
        run,
        {"--curve": curve, "--schedule": schedule, "--target": target, "--warmup": warmup},
        {"--text": text, "--annealed": annealed, "--probe": probe, "--store": store, "--context": context},
    )
    if run is not None:
        refuse_repeated("forecast RUN")  # evaluates, trains a probe, writes into the store
        asked_run = Asked(
            run=run,
            text=text or (),
            anneal=anneal or "",
            steps=steps,
            tokens=tokens,
            batch=batch,
            from_step=from_step,
            floor=floor,
            annealed=annealed or (),
            probe=probe,
            calibration=calibration,
            store=store,
            context=context,
            seed=seed,
        )
        return forecast_run(asked_run, out, as_json=json_output)
    if law not in LAWS:
        raise UsageError(f"--law {law!r} is not known; there are {', '.join(LAWS)}")
    asked = None
    if anneal is not None:
        length = _length(steps, tokens, batch)
        asked = Anneal(shape=anneal, steps=length, from_step=from_step, floor=floor)
    elif steps is not None or tokens is not None or from_step is not None or floor:
        raise UsageError(
            "--steps, --tokens, --from and --floor describe a decay; give its shape with --anneal"
        )
    wanted = request(curve or [], schedule or [], target_path=target, anneal=asked, warmup_steps=warmup)
    learned = learn(wanted.curves, law=LAWS[law], seed=seed)
    found = forecast_of(learned, wanted.target)
    by_length = [(each, forecast_of(learned, each)) for each in wanted.lengths]
    result = _described(wanted, learned, found, by_length)
    if not json_output:
        _show(wanted, learned, found, by_length)
    if out is not None:
        _draw(out, wanted, found, by_length)
        if not json_output:
            say(f"\nChart: {out}")
    return {**result, "chart": str(out) if out is not None else None}


def _check_mode(run: Path | None, of_curves: dict[str, Any], of_runs: dict[str, Any]) -> None:
    """A forecast is from logs or of a run; each has flags of its own."""
    wrong = [flag for flag, value in (of_curves if run is not None else of_runs).items() if value]
    if wrong and run is not None:
        raise UsageError(f"{', '.join(wrong)}: for forecasts from logs, without a RUN ({run})")
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: for the forecast of a RUN, of which there is none")


def _length(steps: int | None, tokens: str | None, batch: str | None) -> int:
    if (steps is None) == (tokens is None):
        raise UsageError("how long is the decay? Give --steps, or --tokens with --batch")
    if steps is not None:
        return steps
    if batch is None:
        raise UsageError("--tokens needs --batch: how many tokens is a step?")
    assert tokens is not None
    count = round(parse_tokens(tokens) / max(parse_tokens(batch), 1))
    if count < 1:
        raise UsageError(f"--tokens {tokens} is less than a step of {batch} tokens")
    return count


def _described(
    wanted: Request, learned: Learned, found: Forecast, by_length: Sequence[tuple[Target, Forecast]]
) -> dict[str, Any]:
    fit = learned.fit
    return {
        "target": wanted.target.name,
        **_end(found),
        "told": found.told,
        "widened": [{"why": why, "factor": factor} for why, factor in found.widened],
        "lengths": [{"steps": each.decay_steps, **_end(value)} for each, value in by_length],
        "against_known": _against_known(wanted.target, found),
        "rows": _rows(found),
        "law": fit.law.name,
        "parameters": fit.parameters,
        "parameter_intervals": {k: list(v) for k, v in learned.parameter_intervals.items()},
        "open_parameters": list(learned.open_parameters),
        "curves": [{"name": c.name, "losses": len(c.steps_R)} for c in wanted.curves],
        "starts_that_agree": list(fit.starts),
        "left_out_errors": [{"curve": h.name, "error": h.error, "whole": h.whole} for h in learned.held],
        "notes": list(wanted.notes),
    }


def _end(found: Forecast) -> dict[str, Any]:
    low, high = found.gain_interval
    return {
        "step": int(found.steps_R[-1]),
        "loss": float(found.loss_R[-1]),
        "interval80": [float(bound[-1]) for bound in found.intervals[0.80]],
        "interval95": [float(bound[-1]) for bound in found.intervals[0.95]],
        "constant_loss": float(found.constant_R[-1]),
        "gain": found.gain,
        "gain_interval95": [low, high],
    }


def _rows(found: Forecast) -> list[dict[str, float]]:
    (low80, high80), (low95, high95) = found.intervals[0.80], found.intervals[0.95]
    columns = {
        "step": found.steps_R,
        "loss": found.loss_R,
        "constant": found.constant_R,
        "low80": low80,
        "high80": high80,
        "low95": low95,
        "high95": high95,
    }
    return [
        dict(zip(columns, values, strict=True))
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]


def _against_known(target: Target, found: Forecast) -> dict[str, float] | None:
    if target.known_R is None:
        return None
    errors = found.loss_R - target.known_R
    return {"mean_absolute_error": float(abs(errors).mean()), "end_error": float(errors[-1])}


def _show(
    wanted: Request, learned: Learned, found: Forecast, by_length: Sequence[tuple[Target, Forecast]]
) -> None:
    fit, target = learned.fit, wanted.target
    for text in wanted.notes:
        note(printable(text, 400))
    losses, count = sum(len(c.steps_R) for c in wanted.curves), len(wanted.curves)
    many = "" if count == 1 else "s"
    same, tried = fit.starts
    note(f"{fit.law.name} law on {count} curve{many}, {losses} losses; {same} of {tried} starts agree")
    if learned.open_parameters:
        note(f"not determined one by one by these curves: {', '.join(learned.open_parameters)}")
    end = _end(found)
    say(f"{printable(target.name, 300)}")
    if not found.told:
        say(f"These curves do not tell what it gives: the 95% interval of the loss at step {end['step']},")
        say(f"{_range(end['interval95'])}, is wider than what annealing could give.")
        say("Add a curve that was annealed, or had a drop of the rate, longer or lower than these.")
    else:
        say(f"expected loss at step {end['step']}: {end['loss']:.4f}")
        say(f"  80%: {_range(end['interval80'])}   95%: {_range(end['interval95'])}")
    if found.told and found.anneals:
        gain = f"{end['gain']:.4f} (95%: {_range(end['gain_interval95'])})"
        say(f"  at its peak rate throughout: {end['constant_loss']:.4f}; annealing gives {gain}")
    for why, _ in found.widened:
        note(f"{why}. The intervals are widened for it")
    if not learned.held:
        note("no curve could be left out to test the law: its own error is taken from other runs")
    known = _against_known(target, found)
    if known is not None:
        mean, last = known["mean_absolute_error"], known["end_error"]
        say(f"  against its own losses, not fitted: mean absolute error {mean:.4f}, at the end {last:+.4f}")
    if len(by_length) > 1:
        say()
        table(
            ("steps", "ends at", "loss", "80%", "95%", "at peak rate"), [_line(*each) for each in by_length]
        )


def _range(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def _line(target: Target, found: Forecast) -> tuple[str, ...]:
    end = _end(found)
    loss = f"{end['loss']:.4f}" if found.told else "not told"
    ranges = (_range(end["interval80"]), _range(end["interval95"]))
    return (str(target.decay_steps), str(end["step"]), loss, *ranges, f"{end['constant_loss']:.4f}")


def _draw(out: Path, wanted: Request, found: Forecast, by_length: Sequence[tuple[Target, Forecast]]) -> None:
    from pma.reporting.forecast_chart import forecast_chart, write_forecast_chart

    curves = [
        {"name": Path(each.name).stem, "step": step, "loss": loss}
        for each in wanted.curves
        for step, loss in zip(each.steps_R.tolist(), each.loss_R.tolist(), strict=True)
    ]
    lengths = [{"steps": each.decay_steps, **_rows(value)[-1]} for each, value in by_length]
    chart = forecast_chart(curves, _rows(found), lengths)
    write_forecast_chart(chart, out, f"{wanted.target.name}: expected loss {found.loss_R[-1]:.4f}")
