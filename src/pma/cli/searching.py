"""`pma sweep --search`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pma import engine, sweeping
from pma.cli import options as flags
from pma.cli.on_ray import Evaluating
from pma.cli.output import note, say, table
from pma.engine import SNAPSHOTS, MergeOptions, Plan
from pma.errors import UsageError
from pma.evaluation.text import Document
from pma.quantities import Tokens, bytes_text, count_text, parse_tokens
from pma.results import Store
from pma.sweeping import Contender, How, Space, distance_text

_SHOWN = 10


def refuse_for_search(*, write: bool, tasks: bool) -> None:
    """Raises UsageError for what does not go with a search."""
    if write:
        raise UsageError("--search writes nothing: it ends with the pma merge command that makes the winner")
    if tasks:
        raise UsageError(
            "--search chooses by the loss of a text, part by part; a task's few items tell little at a time. "
            "Leave --tasks out, or sweep the tasks without --search and confirm the best on others"
        )


def parsed_budget(text: str | None) -> float | Tokens | None:
    """Readings of the whole text (`20`, `7.5`), or tokens (`5M`). Raises UsageError for anything else."""
    if text is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", text, re.ASCII):
        budget: float | Tokens = float(text)
    else:
        budget = Tokens(parse_tokens(text))
    if budget == 0 or budget == Tokens(0):
        raise UsageError(f"--budget {text}: expected readings of the text, such as 20, or tokens, such as 5M")
    return budget


def run_search(
    sources: Sequence[Path],
    space: Space,
    options: MergeOptions,
    documents: Sequence[Document],
    budget: float | Tokens | None,
    store: Path,
    context_tokens: int | None,
    evaluating: Evaluating,
) -> dict[str, Any]:
    """Search, and say what is going on; returns what was found."""
    found = sweeping.of_a_run(sources)
    for path, reason in found.left_out:
        note(f"left out: {path}: {reason}")
    with sweeping.planner(options) as plans, Store(store) as opened:
        field = sweeping.field(found, space, plans)
        for reason in field.skipped:
            note(f"skipped: {reason}")
        how = How(
            context_tokens=context_tokens,
            begin=partial(_begin, evaluating),
            announce=note,
            measuring=evaluating.measuring,
        )
        outcome = sweeping.search(field, plans, documents, budget, opened, how)
    command = merge_command(outcome.winner, sources, space, options)
    return {"search": sweeping.findings(outcome), "command": command, "store": str(store)}


def _begin(evaluating: Evaluating, what: str, missing: Sequence[Plan]) -> None:
    if not missing:
        note(f"{what}: known")
        return
    passes = evaluating.passes(missing)
    read = bytes_text(engine.bytes_to_read_by(missing, passes))
    note(
        f"{what}: {len(missing)} models are new; {len(passes)} pass{'' if len(passes) == 1 else 'es'} over "
        f"the checkpoints, reading {read}"
    )


def merge_command(
    winner: Contender, sources: Sequence[Path], space: Space, options: MergeOptions
) -> str | None:
    """The `pma merge` that makes the winner; None where it is a checkpoint as it is."""
    if winner.last == 1:
        return None
    if winner.best_of is not None:
        words = [str(point.path) for point in winner.points]
    else:
        words = [*map(str, sources), "--last", str(winner.last)]
        words += [] if winner.every is None else ["--every", distance_text(winner.every)]
        words += [] if winner.at is None else ["--at", str(winner.at)]
    weights = ",".join(map(repr, winner.weights or ()))
    words += ["--weights", weights] if winner.weights else ["--scheme", winner.scheme]
    words += ["--dtype", flags.dtype_name(options.dtype)] if options.dtype else []
    words += [word for pattern in options.exclude for word in ("--exclude", pattern)]
    words += [word for pattern in options.copy for word in ("--copy", pattern)]
    words += ["--use", winner.use] if winner.use != SNAPSHOTS else []
    words += ["--allow-mixed-phases"] * space.allow_mixed_phases
    words += ["--allow-nonfinite"] * options.allow_nonfinite
    return shlex.join(["pma", "merge", *words, "-o", "merged"])


def show(result: dict[str, Any]) -> None:
    """Print what was found."""
    found = result["search"]
    documents, tokens = found["documents"], found["tokens"]
    _show_halving(found)
    table(
        ["candidate", "read", "loss (nats a token)"],
        [[row["name"], f"{row['share']:.0%}", f"{row['loss']:.4f}"] for row in found["ranked"][:_SHOWN]],
        title=f"on the half to choose by ({documents['selection']} documents, "
        f"{count_text(tokens['selection'])} tokens)",
    )
    say()
    named = [("winner", found["winner"]), ("plain window", found["plain"]), ("last", found["last"])]
    table(
        ["model", "what it is", "loss (nats a token)", "gain over last"],
        [
            [
                name,
                model["name"],
                _with_error(model["report"]["loss"], ".4f"),
                _with_error(model["report"]["gain"], "+.4f") if "gain" in model["report"] else "",
            ]
            for name, model in named
        ],
        title=f"on the other half ({documents['report']} documents, {count_text(tokens['report'])} tokens), "
        "by which nothing was chosen",
    )
    say()
    say(_verdict(found))
    say(
        f"The half it was chosen by shows a gain of {found['winner']['selection']['gain']['value']:+.4f}: "
        f"{_with_error(found['flattered_by'], '+.4f')} more than the other; over the plain window, which "
        f"tells the choice from the halves, {_with_error(found['flattered_beyond_plain'], '+.4f')} more."
    )
    if found["winner_is_longest"]:
        say("No window had more checkpoints; longer ones may be better still: widen the search with --last.")
    if result["command"] is None:
        say("No merge was better than the last checkpoint.")
    else:
        say(f"It is made by: {result['command']}")


def _show_halving(found: dict[str, Any]) -> None:
    for number, rung in enumerate(found["rungs"], 1):
        say(
            f"rung {number} of {len(found['rungs'])}: {rung['candidates']} candidates on {rung['parts']} of "
            f"{found['parts']} parts"
        )
    known = found["tokens_known"]
    say(
        f"{found['candidates']} candidates; {found['evaluations']:.1f} of {found['budget']:.4g} readings of "
        f"the text, {count_text(found['tokens_read'])} tokens"
        + (f", of which {count_text(known)} were known before" if known else "")
    )
    say()


def _verdict(found: dict[str, Any]) -> str:
    below = found["winner_below_plain"]
    amount = f"{_with_error(below, '+.4f')} nats a token (95%: {below['low']:+.4f} to {below['high']:+.4f})"
    if found["winner_is_plain"]:
        return "The winner is the plain window: the search found nothing better."
    if below["low"] > 0:
        return f"The search paid: the winner is below the plain window by {amount}."
    if below["high"] < 0:
        return f"The search did not pay: on other text the winner is above the plain window, {amount}."
    return f"The winner cannot be told from the plain window: below it by {amount}."


def _with_error(estimate: dict[str, float], form: str) -> str:
    return f"{estimate['value']:{form}} ± {estimate['standard_error']:.4f}"
