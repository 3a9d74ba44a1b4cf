"""`pma sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pma import engine, sweeping, verbs
from pma.cli import options as flags
from pma.cli import searching
from pma.cli.on_ray import Evaluating, ModelsPerNode, On, RayAddress, evaluating, nodes_shown, on_ray
from pma.cli.output import command, note, say, table
from pma.cli.transfer import sending, transfer
from pma.engine import SNAPSHOTS, How, Plan
from pma.errors import MissingExtra, UsageError
from pma.evaluation.measures import Measure, task_measure, text_measure
from pma.quantities import Steps, Tokens, bytes_text, parse_distance
from pma.remote import location
from pma.results import Store
from pma.sweeping import Grid, Results, Space, Sweep

_MEMORY = "2GiB"
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("sweep", short_help="Many merges from few reads, evaluated or written.")(command(sweep))


def sweep(
    sources: flags.Sources,
    last: Annotated[
        str | None, typer.Option("--last", metavar="N,N,…", help="Numbers of checkpoints.")
    ] = None,
    every: Annotated[
        str | None, typer.Option("--every", metavar="V,V,…", help="Distances: 8B (tokens) or 400 (steps).")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="STEP,…", help="Steps at which windows end; the newest by default."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", metavar="S,S,…", help="Schemes, as in pma merge; sma by default."),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="Choose on half of the text within a budget, report on the other."),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="EVALS", help="Readings of the text (20), or tokens (5M), that it may take."
        ),
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(
            "--best", metavar="K,K,…", help="Also merge the K best recent checkpoints; none for none."
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", parser=location, metavar="DIR", help="Write every merge into a folder of DIR."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Held-out text; without --write or --tasks, what the run held out."),
    ] = None,
    cloze: flags.Cloze = 400,
    context: flags.Context = None,
    tasks: flags.Tasks = None,
    limit: flags.TaskLimit = None,
    weights: flags.TaskWeights = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", metavar="FILE", help="Where results are kept; RUN/.pma by default (of a URL: ./.pma)."
        ),
    ] = None,
    dtype: flags.OutputDType = None,
    exclude: flags.Exclude = None,
    copy: flags.Copy = None,
    use: flags.Use = SNAPSHOTS,
    allow_mixed_phases: flags.MixedPhases = False,
    allow_nonfinite: flags.Nonfinite = False,
    staging: flags.Staging = None,
    fresh: flags.Fresh = False,
    break_lock: flags.BreakLock = False,
    threads: flags.Threads = 2,
    memory: Annotated[
        str, typer.Option("--memory", help="Budget for buffers and for merged models.")
    ] = _MEMORY,
    on: On = None,
    ray_address: RayAddress = None,
    per_node: ModelsPerNode = None,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Every combination of windows and schemes, from as few reads of the checkpoints as memory allows.

    Evaluates each merge without writing it, and keeps the results: a repeated or wider sweep computes only
    what is new. With --write each is written as pma merge would, to the bit.

    With --search it chooses on one half of the text, where what is behind is dropped early, and reports the
    winner on the other. --last, --every, --at, --scheme, --best say what it tries; it chooses what is left
    out.

    Example: pma sweep run --last 3,6,10 --every 25,50 --scheme sma,wma,ema:0.2,1-sqrt

    Example: pma sweep run --last 3,6,10 --tasks evals/ --limit 500

    Example: pma sweep run --search --budget 20
    """
    if weights is not None and not tasks:
        raise UsageError("--weights weighs --tasks, of which there are none")
    options = flags.merge_options(
        "sma",
        None,
        dtype,
        exclude,
        copy,
        use=use,
        allow_nonfinite=allow_nonfinite,
        threads=threads,
        memory=memory,
    )
    ray = on_ray(on, ray_address, per_node)
    lasts, everys, ats = _numbers(last, "--last"), _distances(every), _numbers(at, "--at")
    schemes = tuple(scheme.split(",")) if scheme else None
    kept = store or sweeping.store_beside(sources[0])
    if search:
        searching.refuse_for_search(write=write is not None, tasks=bool(tasks))
        space = Space(
            lasts=lasts,
            everys=everys,
            ats=ats or (None,),
            schemes=schemes,
            best=() if best == "none" else _numbers(best, "--best"),
            allow_mixed_phases=allow_mixed_phases,
        )
        documents = verbs.held_out_documents(text or (), sources[0])
        spend = searching.parsed_budget(budget)
        with evaluating(ray, threads=threads, per_node=per_node, as_json=json_output) as engines:
            result = searching.run_search(sources, space, options, documents, spend, kept, context, engines)
        if not json_output:  # after the block: on a cluster, whatever is printed in it goes to stderr
            searching.show(result)
        return result
    if budget is not None or best is not None:
        raise UsageError("--budget and --best go with --search")
    if lasts is None:
        raise UsageError("which windows? Say --last N,N,…, or --search to have them chosen")
    grid = Grid(
        lasts=lasts,
        everys=everys or (None,),
        ats=ats or (None,),
        schemes=schemes or ("sma",),
        allow_mixed_phases=allow_mixed_phases,
    )
    with sweeping.planned(sources, grid, options) as planned:
        result = _announced(planned)
        if write is not None:
            how = How(
                staging=staging, fresh=fresh, break_lock=break_lock, sending=sending(as_json=json_output)
            )
            how |= {"ray": ray, "tell": note}
            _write(planned, write, result, how, as_json=json_output)
        if write is None or text or tasks:
            documents = verbs.held_out_documents(text or (), sources[0]) if text or not tasks else []
            with flags.prepared_tasks(tasks, limit, weights) as (ready, shares):
                measures = [task_measure(task, context_tokens=context) for task in ready]
                if documents:
                    measures.insert(0, text_measure(documents, cloze=cloze, context_tokens=context))
                with evaluating(ray, threads=threads, per_node=per_node, as_json=json_output) as engines:
                    done, told = _evaluate(planned, measures, kept, context, engines)
                rows = sweeping.rows(planned, done, shares)
                result |= {"rows": rows, **told, "pictures": _draw(rows, kept.parent / "sweep")}
            if not json_output:
                _show(result)
    return result


def _evaluate(
    planned: Sweep,
    measures: list[Measure],
    store: Path,
    context: int | None,
    engines: Evaluating,
) -> tuple[dict[int, Results], dict[str, Any]]:
    """What was measured of each plan, and how it came about."""
    told: dict[str, Any] = {"store": str(store)}

    def begin(missing: Sequence[Plan]) -> None:
        passes = engines.passes(missing) if missing else []
        told.update(_announced_passes("evaluation", missing, passes, len(planned.plans)))

    with Store(store) as opened:
        done, told["from_store"] = sweeping.evaluate(
            planned,
            measures,
            opened,
            context_tokens=context,
            announce=note,
            begin=begin,
            measuring=engines.measuring,
        )
    return done, told


def _numbers(text: str | None, flag: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{flag} {text!r}: expected whole numbers separated by commas, such as 3,6,10")
    return tuple(map(int, parts))


def _distances(text: str | None) -> tuple[Steps | Tokens, ...] | None:
    return tuple(map(parse_distance, text.split(","))) if text else None


def _announced(planned: Sweep) -> dict[str, Any]:
    """Say what the grid came to, and return it."""
    for path, reason in planned.left_out:
        note(f"left out: {path}: {reason}")
    for reason in planned.skipped:
        note(f"skipped: {reason}")
    distinct = len({cell.plan for cell in planned.cells})
    return {"merges": len(planned.cells), "distinct": distinct, "skipped": list(planned.skipped)}


def _announced_passes(
    kind: str, missing: Sequence[Plan], passes: Sequence[Sequence[int]], of: int
) -> dict[str, Any]:
    """Say what is to be made, in how many passes, from how many bytes; and return it."""
    read = engine.bytes_to_read_by(missing, passes)
    note(
        f"{kind}: {len(missing)} of {of} distinct models are new; {len(passes)} "
        f"pass{'' if len(passes) == 1 else 'es'} over the checkpoints, reading {bytes_text(read)}"
    )
    return {f"{kind}_passes": len(passes), f"{kind}_bytes_to_read": read}


def _write(planned: Sweep, folder: Path, result: dict[str, Any], how: How, *, as_json: bool) -> None:
    missing = [plan for plan, _ in sweeping.unwritten(planned, folder)]
    if how.get("ray") is None:
        passes = engine.passes(missing, in_memory=False)
    else:  # one after the other, each by all nodes
        passes = [[number] for number in range(len(missing))]
    result |= _announced_passes("writing", missing, passes, result["distinct"])
    total = sum(plan.bytes_to_write for plan in missing)
    with (
        nodes_shown(as_json=as_json) as show_nodes,
        transfer("writing", total, as_json=as_json) as show,
    ):
        how |= {"progress": show, "show_nodes": show_nodes}
        written = sweeping.write(planned, folder, **how)
    if not as_json:
        for path in sorted({path for _, path in written}):
            say(str(path))
    result["written"] = [
        {
            "scheme": cell.scheme,
            "last": cell.last,
            "every": _or_dash(cell.every),
            "at": cell.at,
            "path": str(path),
        }
        for cell, path in written
    ]


def _draw(rows: list[dict[str, Any]], path: Path) -> list[str]:
    from pma.reporting import sweep_charts

    drawn: list[Path] = []
    try:
        if "loss" in rows[0]:
            losses = [{**row, "standard_error": row["gain_standard_error"]} for row in rows]
            drawn += sweep_charts.write_sweep_chart(losses, path)
        if "mean_score" in rows[0]:
            scores = [
                {
                    **row,
                    "loss": row["mean_score"],
                    "gain": row["mean_score_gain"],
                    "standard_error": row["mean_score_gain_standard_error"],
                }
                for row in rows
            ]
            name = f"{path.name}-tasks"
            drawn += sweep_charts.write_sweep_chart(scores, path.with_name(name), sweep_charts.SCORE)
    except MissingExtra as missing:
        note(f"no chart: {missing}")
    return [str(made) for made in drawn]


def _show(result: dict[str, Any]) -> None:
    rows = result["rows"][:_SHOWN]
    headings = ["scheme", "N", "every", "at"]
    cells = [[row["scheme"], str(row["last"]), row["every"], str(row["at"])] for row in rows]
    if "loss" in rows[0]:
        headings += ["loss (nats a token)", "gain over raw", "bits per byte"]
        for row, line in zip(rows, cells, strict=True):
            line.append(f"{row['loss']:.4f} ± {row['standard_error']:.4f}")
            line.append(f"{row['gain']:+.4f} ± {row['gain_standard_error']:.4f}")
            line.append(f"{row['bits_per_byte']:.4f}")
    if "mean_score" in rows[0]:
        names = list(rows[0]["tasks"])
        headings += [*names, "weighted mean", "gain over raw"]
        for row, line in zip(rows, cells, strict=True):
            line += [f"{100 * row['tasks'][name]['score']:.2f}%" for name in names]
            line.append(f"{100 * row['mean_score']:.2f}% ± {100 * row['mean_score_standard_error']:.2f}%")
            gain, error = row["mean_score_gain"], row["mean_score_gain_standard_error"]
            line.append(f"{100 * gain:+.2f}% ± {100 * error:.2f}%")
    table(headings, cells)
    more = len(result["rows"]) - _SHOWN
    if more > 0:
        say(f"… and {more} more, see {result['store']}")
    say(f"{result['from_store']} evaluations were known before; all are in {result['store']}")
    for picture in result["pictures"]:
        say(f"  {picture}")
    say("The best of many looks better than it is: confirm it on other text before you rely on it.")


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
