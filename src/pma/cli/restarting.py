"""`pma init`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pma import engine, restart, trajectory, verbs
from pma.cli import options as flags
from pma.cli.launching import launched, speaks
from pma.cli.output import command, note, say
from pma.cli.transfer import cost, sending, show_cost, told_by_another, transfer
from pma.errors import UsageError
from pma.remote import location

_DEFAULT_LAST = 3


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command("init", short_help="A merge that training goes on from.")(command(init))


def init(
    sources: flags.Sources,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=location, metavar="PATH", help="The new folder.", show_default=False
        ),
    ],
    last: Annotated[
        int | None,
        typer.Option("--last", metavar="N", help="Average the newest N; 3 by default."),
    ] = None,
    every: flags.Every = None,
    at: flags.At = None,
    before_step: Annotated[
        int | None,
        typer.Option("--before-step", metavar="STEP", help="End the window before this step, as of a spike."),
    ] = None,
    preset: flags.UsePreset = False,
    scheme: flags.SchemeName = "sma",
    weights: flags.Weights = None,
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer",
            help="Moments: newest; second-moment (first is zero); average; reset (all zero).",
        ),
    ] = "newest",
    purpose: Annotated[
        str | None, typer.Option("--for", help="sft or ct: weights only, to start another stage.")
    ] = None,
    as_given: flags.AsGiven = False,
    pattern: flags.Pattern = None,
    allow_mixed_phases: flags.MixedPhases = False,
    allow_nonfinite: flags.Nonfinite = False,
    inside_run: Annotated[bool, typer.Option("--inside-run", help="Allow an output inside the run.")] = False,
    staging: flags.Staging = None,
    fresh: flags.Fresh = False,
    break_lock: flags.BreakLock = False,
    threads: flags.Threads = 2,
    memory: flags.Memory = flags.DEFAULT_MEMORY,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """A checkpoint that the run's own trainer goes on from: weights and fp32 masters averaged, moments as
    asked for, step, schedule, data position and random states of the newest checkpoint of the window.

    Example: pma init runs/7b -o init --before-step 41200 --optimizer second-moment
    """
    in_a_run = not preset and (pattern is not None or not trajectory.is_checkpoint(sources[0]))
    chosen = flags.choice(
        sources,
        last=_DEFAULT_LAST if last is None and in_a_run else last,
        every=every,
        at=at,
        preset=preset,
        as_given=as_given,
        pattern=pattern,
        allow_mixed_phases=allow_mixed_phases,
    )
    if purpose is not None and optimizer != "newest":
        raise UsageError(f"--for {purpose} carries no optimizer's state; leave --optimizer out")
    options = flags.merge_options(
        scheme, weights, allow_nonfinite=allow_nonfinite, threads=threads, memory=memory
    )
    crew = launched()
    with verbs.plan_init(
        chosen, options, optimizer=optimizer, purpose=purpose or "resume", before_step=before_step
    ) as planned:
        for path, reason in planned.left_out if speaks(crew) else ():
            note(f"left out: {path}: {reason}")
        if crew is None:  # else rank 0 finds out while the others wait
            for warning in engine.check_output(
                planned, out, inside_run=inside_run, staging=staging, fresh=fresh
            ):
                note(f"warning: {warning}")
        with transfer("merging", planned.bytes_to_write, as_json=json_output, quiet=not speaks(crew)) as show:
            done = restart.write(
                planned,
                out,
                optimizer=optimizer,
                purpose=purpose or "resume",
                inside_run=inside_run,
                fresh=fresh,
                break_lock=break_lock,
                progress=show,
                staging=staging,
                sending=sending(as_json=json_output),
                crew=crew,
                tell=note,
            )
    if crew is not None and not crew.leads:
        return told_by_another(crew, done.merge)
    result = {**asdict(done.merge), **asdict(done), "path": str(out), **cost(done.merge, None)}
    del result["merge"]
    if not json_output:
        _show(done, result)
    return result


def _show(done: restart.Restart, result: dict[str, Any]) -> None:
    at = f", step {done.step}" if done.step is not None else ""
    say(f"{done.path}: {done.merge.scheme} of {done.merge.checkpoints} checkpoints{at}")
    for what in ("averaged", "kept", "reset"):
        listed = result[what]
        if listed:
            say(f"  {what:<9} {', '.join(listed)}")
    show_cost(result)
    if done.resume_command:  # nothing is known of a format that a plug-in brings
        say()
        say("Go on with:" if done.optimizer is not None else "Start with:")
        say(f"  {done.resume_command}")
    for line in done.notes:
        say(f"  ({line})")
