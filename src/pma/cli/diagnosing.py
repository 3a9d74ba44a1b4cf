"""`pma diagnose`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pma import verbs
from pma.cli import looking
from pma.cli import options as flags
from pma.cli.on_ray import On, PerNode, RayAddress, Show, nodes_shown, on_ray
from pma.cli.output import command, note, progress, say, table
from pma.engine import OnRay
from pma.errors import UsageError, printable
from pma.quantities import bytes_text, count_text
from pma.remote import location

if TYPE_CHECKING:
    from pma.diagnosis.diagnosing import Diagnosis, Reading
    from pma.diagnosis.movement import Movement
    from pma.diagnosis.verdict import Advice

_WINDOWS_SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command("diagnose", short_help="What checkpoints tell about merging them; no evaluation.")(
        command(diagnose)
    )


def diagnose(
    sources: flags.Sources,
    last: flags.Last = None,
    every: flags.Every = None,
    at: flags.At = None,
    preset: flags.UsePreset = False,
    log: Annotated[
        Path | None,
        typer.Option("--log", parser=location, metavar="LOG", help="The run's log, if it lies elsewhere."),
    ] = None,
    exclude: flags.Exclude = None,
    as_given: flags.AsGiven = False,
    pattern: flags.Pattern = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Held-out text: adds the line through the merge, curvature, routing."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", metavar="FILE", help="With --text: where results are kept; RUN/.pma by default."
        ),
    ] = None,
    threads: flags.Threads = 2,
    memory: flags.Memory = flags.DEFAULT_MEMORY,
    on: On = None,
    ray_address: RayAddress = None,
    per_node: PerNode = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Merge, wait, or not here, and with which window: what the newest checkpoints and the log tell. How far
    and how straight the weights moved, drift against noise, how many are independent, by group of tensors.

    Each is read once; nothing is written or evaluated. Without --last it takes the newest 20.

    With --text models are evaluated: last, the merge, and what lies on the line through them; half of the
    documents are to choose by, and the other half is reported on. That is in this process, also with --on
    ray, which shares out the reading.

    Example: pma diagnose runs/7b --last 12 --every 8B

    Example: pma diagnose runs/7b --last 12 --every 8B --text held_out/
    """
    if store is not None and not text:
        raise UsageError("--store keeps what --text gives, of which there is none")
    ray = on_ray(on, ray_address, per_node)
    chosen = flags.choice(
        sources,
        last=last,
        every=every,
        at=at,
        preset=preset,
        as_given=as_given,
        pattern=pattern,
    )
    options = flags.merge_options("sma", exclude=exclude, threads=threads, memory=memory)
    look = looking.planned(chosen, options, text, store) if text else None
    with nodes_shown(as_json=json_output) as show_nodes:
        done = _read(chosen, options, log, _reading(ray, show_nodes), quiet=json_output)
    if not json_output:
        show(done)
    if look is None:
        return done.to_json()
    looked = looking.take(look, quiet=json_output)
    if not json_output:
        looking.show(look, looked)
    return {**done.to_json(), "look": looked}


def _reading(ray: OnRay | None, show: Show) -> Reading | None:
    if ray is None:
        return None
    from pma.engine.on_ray.products import inner_products

    return partial(inner_products, on=ray, show=show, tell=note)


def _read(
    chosen: verbs.Choice,
    options: verbs.MergeOptions,
    log: Path | None,
    reading: Reading | None,
    *,
    quiet: bool,
) -> Diagnosis:
    if quiet:
        return verbs.diagnose(chosen, options, log=log, reading=reading)
    with progress("reading", 1) as bar:
        seen = [0]

        def moved(read: int, total: int) -> None:
            seen[0] += read
            bar(seen[0] / max(total, 1), f"{bytes_text(seen[0])} of {bytes_text(total)}")

        return verbs.diagnose(chosen, options, log=log, progress=moved, reading=reading)


def show(done: Diagnosis) -> None:
    """Print it for people."""
    first, newest = done.points[0], done.points[-1]
    for text in done.notes:
        note(printable(text, 400))
    where = f"steps {first.step} to {newest.step}" if done.unit == "steps" else "in the order given"
    phases = ", ".join(dict.fromkeys(point.phase.value for point in done.points))
    rate = f", lr {newest.learning_rate:g}" if newest.learning_rate is not None else ""
    read = f"{bytes_text(done.bytes_read)} read"
    say(f"{len(done.points)} checkpoints, {where}; phase {phases}{rate}; {read}")
    for change in done.changes:
        say(f"the schedule changes {change}")
    for found in done.breakaways:
        what = "gradient norm" if found.quantity == "grad_norm" else "loss"
        say(f"{what} broke away at step {found.first_step}: {found.kind.words}")
    rows = [_row(name, group, done) for name, group in done.groups.items()]
    columns = ("tensors", "values", "moved", "straight", "next cosine", "drift", "memory", "independent")
    table(
        (*columns, "merge norm", "directions"),
        [*rows, _row("all", done.whole, done)],
    )
    say()
    _show_advice(done.advice)


def _show_advice(advice: Advice) -> None:
    say(f"Verdict: {advice.verdict.value}" + (f", {advice.windows[0].flags}" if advice.to_merge else ""))
    for reason in advice.reasons:
        say(f"  {printable(reason, 400)}")
    if advice.windows:
        rows = [
            (
                window.flags,
                f"{window.predicted.gain:+.3f}",
                f"{window.predicted.error:.3f}",
                f"{window.predicted.noise:.3f}",
                f"{window.predicted.cost:.3f}",
            )
            for window in advice.windows[:_WINDOWS_SHOWN]
        ]
        table(("window", "gain, nats", "± error", "noise removed", "drift costs"), rows)


def _row(name: str, moved: Movement, done: Diagnosis) -> tuple[str, ...]:
    walk, steps_N = moved.walk, done.positions_N
    span = steps_N[-1] - steps_N[0]
    every = span / (len(steps_N) - 1)
    return (
        name,
        count_text(moved.elements),
        _share(moved.distance, moved.newest_norm),
        _share(moved.distance, moved.path),
        "–" if moved.neighbours is None else f"{moved.neighbours:+.2f}",
        "–" if walk is None else f"{100 * walk.drift_share(span):.0f}%",
        "–" if walk is None else f"{walk.memory(every):.2f}",
        "–" if walk is None else f"{walk.effective(steps_N):.1f}",
        _share(moved.merge_norm, moved.members_norm),
        " ".join(f"{100 * share:.0f}%" for share in moved.shares_K),
    )


def _share(value: float, of: float) -> str:
    return f"{100 * value / of:.1f}%" if of > 0 else "–"
