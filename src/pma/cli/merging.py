"""`pma plan`, `pma merge`, `pma verify`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pma import engine, trajectory, verbs
from pma.cli import options as flags
from pma.cli.interval_means import means_text, note_gaps, note_means, sources_text
from pma.cli.launching import launched, speaks
from pma.cli.on_ray import On, PerNode, RayAddress, nodes_shown, on_ray
from pma.cli.output import command, note, or_unknown, say, table
from pma.cli.transfer import cost, sending, show_cost, told_by_another, transfer
from pma.engine import SNAPSHOTS, Plan
from pma.errors import UsageError, printable
from pma.quantities import bytes_text, count_text, parse_rate
from pma.remote import location


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("plan", short_help="What a merge would do; reads headers only.")(command(plan))
    app.command("merge", short_help="Average checkpoints into a new one.")(command(merge))
    app.command("verify", short_help="Is a merge still what was written, and right?")(command(verify))


def plan(
    sources: flags.Sources,
    last: flags.Last = None,
    every: flags.Every = None,
    at: flags.At = None,
    preset: flags.UsePreset = False,
    scheme: flags.SchemeName = "sma",
    weights: flags.Weights = None,
    dtype: flags.OutputDType = None,
    exclude: flags.Exclude = None,
    copy: flags.Copy = None,
    with_optimizer: flags.WithOptimizer = False,
    to: flags.To = None,
    like: flags.Like = None,
    map_name: flags.MapName = None,
    use: flags.Use = SNAPSHOTS,
    as_given: flags.AsGiven = False,
    pattern: flags.Pattern = None,
    allow_mixed_phases: flags.MixedPhases = False,
    allow_nonfinite: flags.Nonfinite = False,
    threads: flags.Threads = 2,
    memory: flags.Memory = flags.DEFAULT_MEMORY,
    nodes: flags.Nodes = None,
    read: flags.ReadRate = "1GB/s",
    write: flags.WriteRate = "1GB/s",
    on: On = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """What a merge would do, without reading a tensor: sources, weights, tensors by policy, bytes, memory.

    Without --last it suggests and uses the paper's window for the model's size.

    Example: pma plan runs/7b --last 10 --every 8B --scheme wma
    """
    is_run = pattern is not None or not trajectory.is_checkpoint(sources[0])
    chosen = flags.choice(
        sources,
        last=last,
        every=every,
        at=at,
        preset=preset or (is_run and last is None and every is None),
        as_given=as_given,
        pattern=pattern,
        allow_mixed_phases=allow_mixed_phases,
    )
    options = flags.merge_options(
        scheme,
        weights,
        dtype,
        exclude,
        copy,
        with_optimizer=with_optimizer,
        to=to,
        like=like,
        map_name=map_name,
        use=use,
        allow_nonfinite=allow_nonfinite,
        threads=threads,
        memory=memory,
    )
    rates = {"read_rate": parse_rate(read), "write_rate": parse_rate(write)}
    ray = on_ray(on, None, None) is not None
    if ray and nodes is None:
        raise UsageError("pma plan --on ray needs --nodes: on how many")
    started = time.monotonic()
    with verbs.plan(chosen, options) as planned:
        description = planned.describe()
        if nodes is not None:
            seconds = time.monotonic() - started
            found = engine.predict(planned, nodes, planning_seconds=seconds, on_ray=ray, **rates)
            description["scaling"] = asdict(found)
    if is_run:
        description["suggestion"] = verbs.suggestion(trajectory.resolve(sources, pattern=pattern))
    if not json_output:
        _show_plan(description)
    return description


def _show_plan(description: dict[str, Any]) -> None:
    rows = [
        (
            printable(source["path"]),
            or_unknown(source["step"]),
            count_text(source["tokens"]) if source["tokens"] else "unknown",
            or_unknown(source["learning_rate"]),
            source["phase"],
            f"{source['weight']:.4f}",
            bytes_text(source["bytes"]),
        )
        for source in description["sources"]
    ]
    table(("checkpoint", "step", "tokens", "lr", "phase", "weight", "size"), rows)
    for entry in description["left_out"]:
        note(f"left out: {entry['path']}: {entry['reason']}")
    note_means(description)
    if description["ignored_files"]:
        note(f"not part of the checkpoints and not read: {_listed(_beside(description))}")
    policies = ", ".join(f"{count} {policy}" for policy, count in description["tensors"].items() if count)
    read, written = description["bytes_to_read"], description["bytes_to_write"]
    say()
    say(f"scheme      {description['scheme']}")
    if description["interval_means"] is not None:
        say(f"averages    {means_text(description['interval_means'])}")
    say(f"tensors     {policies}; {count_text(description['parameters'])} parameters")
    for what in ("copied", "excluded"):
        if description[what]:
            say(f"{what:<11} {_listed(description[what])}")
    count, entries = description["training_state_left_out"], description["entries_left_out"]
    without = [f"{count} tensors of training state"] * bool(count) + [_listed(entries)] * bool(entries)
    if without:
        say(f"left out    {'; '.join(without)} (--with-optimizer carries training state)")
    if description["conversion"] is not None:
        how = description["conversion"]
        say(f"becomes     the model of {printable(how['like'])}, by map {printable(how['map'])}")
    say(f"output      {', '.join(description['output_dtypes'])} in {len(description['output_files'])} files")
    say(f"reads       {bytes_text(read)}, writes {bytes_text(written)}")
    say(f"time        {description['seconds_at_1GB_per_second']:g} s on storage that moves 1GB/s")
    say(
        f"memory      {bytes_text(description['peak_memory_bytes'])} at most, {description['threads']} "
        "threads"
    )
    if "scaling" in description:
        _show_scaling(description["scaling"])
    if "suggestion" in description:
        say(f"suggestion  {description['suggestion']}")


def _show_scaling(scaling: dict[str, Any]) -> None:
    rates = [f"{bytes_text(scaling[f'{what}_bytes_per_second'])}/s" for what in ("read", "write")]
    moved = [bytes_text(scaling[f"bytes_to_{what}_per_node"]) for what in ("read", "write")]
    say(
        f"{scaling['nodes']} nodes".ljust(12) + f"{scaling['seconds']:.3g} s where each reads {rates[0]} and "
        f"writes {rates[1]}; planning is {scaling['planning_seconds']:.2g} s of that, starting and meeting "
        f"{scaling['starting_seconds']:.2g} s"
    )
    say(
        f"            each reads {moved[0]} and writes {moved[1]} at most, in "
        f"{bytes_text(scaling['peak_memory_bytes_per_node'])} of memory; "
        f"{scaling['files_shared']} files are written by more than one"
    )
    files, in_store = scaling["files"], scaling["files_in_store"]
    sharded = f"re-sharded from {files} into {in_store}" if in_store > files else f"{in_store}"
    say(
        f"            into a store {scaling['seconds_to_store']:.3g} s: each file is one node's, "
        f"{sharded} files"
    )
    if scaling["nodes_idle"]:
        say(f"            {scaling['nodes_idle']} nodes have nothing to do: there are fewer blocks")


def _beside(description: dict[str, Any]) -> list[str]:
    """Files that are ignored, once for all checkpoints that have them."""
    folders = [f"{source['path']}/" for source in description["sources"]]
    inner = [
        next((file.removeprefix(folder) for folder in folders if file.startswith(folder)), file)
        for file in description["ignored_files"]
    ]
    return [f"{name} ({count} times)" if count > 1 else name for name, count in Counter(inner).items()]


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def merge(
    sources: flags.Sources,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=location, metavar="PATH", help="The new folder.", show_default=False
        ),
    ],
    last: flags.Last = None,
    every: flags.Every = None,
    at: flags.At = None,
    preset: flags.UsePreset = False,
    scheme: flags.SchemeName = "sma",
    weights: flags.Weights = None,
    dtype: flags.OutputDType = None,
    exclude: flags.Exclude = None,
    copy: flags.Copy = None,
    with_optimizer: flags.WithOptimizer = False,
    to: flags.To = None,
    like: flags.Like = None,
    map_name: flags.MapName = None,
    use: flags.Use = SNAPSHOTS,
    as_given: flags.AsGiven = False,
    pattern: flags.Pattern = None,
    allow_mixed_phases: flags.MixedPhases = False,
    allow_nonfinite: flags.Nonfinite = False,
    inside_run: Annotated[bool, typer.Option("--inside-run", help="Allow an output inside the run.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Also record SHA-256 of the output.")] = False,
    hash_sources: Annotated[
        bool, typer.Option("--hash-sources", help="Also record SHA-256 of the sources.")
    ] = False,
    staging: flags.Staging = None,
    fresh: flags.Fresh = False,
    break_lock: flags.BreakLock = False,
    measure_roofline: flags.MeasureRoofline = False,
    threads: flags.Threads = 2,
    memory: flags.Memory = flags.DEFAULT_MEMORY,
    on: On = None,
    ray_address: RayAddress = None,
    per_node: PerNode = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Average checkpoints into a new checkpoint. Nothing is overwritten; what is interrupted never looks
    complete, and the same command goes on with it.

    Example: pma merge runs/7b -o merged --last 10 --every 8B
    """
    chosen = flags.choice(
        sources,
        last=last,
        every=every,
        at=at,
        preset=preset,
        as_given=as_given,
        pattern=pattern,
        allow_mixed_phases=allow_mixed_phases,
    )
    options = flags.merge_options(
        scheme,
        weights,
        dtype,
        exclude,
        copy,
        with_optimizer=with_optimizer,
        to=to,
        like=like,
        map_name=map_name,
        use=use,
        allow_nonfinite=allow_nonfinite,
        threads=threads,
        memory=memory,
    )
    crew = launched(measures_roofline=measure_roofline)
    ray = on_ray(on, ray_address, per_node, crew=crew, measures_roofline=measure_roofline)
    with verbs.plan(chosen, options) as planned:
        if speaks(crew):
            _note_left_out(planned)
        if crew is None:  # else rank 0 finds out while the others wait
            for warning in engine.check_output(
                planned,
                out,
                inside_run=inside_run,
                staging=staging,
                fresh=fresh,
                on_nodes=ray is not None,
            ):
                note(f"warning: {warning}")
        roofline = (
            engine.measure_roofline(planned, engine.built_at(out, staging)) if measure_roofline else None
        )
        with (
            nodes_shown(as_json=json_output) as show_nodes,
            transfer("merging", planned.bytes_to_write, as_json=json_output, quiet=not speaks(crew)) as show,
        ):
            done = engine.write(
                planned,
                out,
                crew=crew,
                ray=ray,
                show_nodes=show_nodes,
                tell=note,
                inside_run=inside_run,
                sha256=sha256,
                hash_sources=hash_sources,
                fresh=fresh,
                break_lock=break_lock,
                progress=show,
                staging=staging,
                sending=sending(as_json=json_output),
            )
    if crew is not None and not crew.leads:
        return told_by_another(crew, done)
    result = {**asdict(done), "path": str(out), **cost(done, roofline)}
    if not json_output:
        say(f"{out}: {done.scheme} of {done.checkpoints} {sources_text(use)}")
        show_cost(result)
    return result


def _note_left_out(planned: Plan) -> None:
    for path, reason in planned.left_out:
        note(f"left out: {path}: {reason}")
    if planned.options.uses_means:
        note_gaps(planned.describe()["interval_means"])


def verify(
    out: Annotated[
        Path,
        typer.Argument(
            parser=location, metavar="OUT", help="A folder that `pma merge` wrote.", show_default=False
        ),
    ],
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Blocks to derive again from the sources; 0 for none.")
    ] = 16,
    full: Annotated[bool, typer.Option("--full", help="Derive every block again.")] = False,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Is a merge still what was written, and right? Hashes it again, and derives sampled blocks, or all, from
    the sources.

    Example: pma verify merged
    """
    done = engine.verify(out, samples=None if full else samples)
    if not json_output:
        say(
            f"{out}: {done.chunks_hashed} chunks hashed, {done.blocks_derived} of {done.blocks_total} blocks "
            "derived again"
        )
        for finding in done.findings:
            say(f"  wrong: {finding}")
        for change in done.sources_changed:
            say(f"  source: {change}; nothing was derived again")
        if not done.findings and not done.sources_changed:
            say(
                "  every file is as it was written"
                + (", and what its sources give" if done.blocks_derived else "")
            )
    return {**asdict(done), "path": str(out), "exit_status": 1 if done.findings else 0}
