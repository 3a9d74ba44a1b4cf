"""What `--text` adds to `pma diagnose`: a look around the window's merge, kept beside the run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma import sweeping, trajectory, verbs
from pma.analysis.keeping import LOOKS, Budget, look_key
from pma.cli.output import note, progress, say, table
from pma.engine import MergeOptions
from pma.evaluation.text import Document, read_documents
from pma.quantities import Steps, distance_flag
from pma.results import Store
from pma.verbs import Choice

_FEW_DOCUMENTS = 20


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A look that was checked and not taken. `known`: the same one, taken before."""

    choice: Choice
    options: MergeOptions
    documents: tuple[Document, ...]
    store: Path
    key: str
    known: dict[str, Any] | None


def planned(choice: Choice, options: MergeOptions, texts: list[Path], store: Path | None) -> Planned:
    """Find out whether it can be taken and kept, before anything that is long."""
    choice, documents = verbs.newest_by_default(choice), tuple(read_documents(texts))
    verbs.check_look(choice, documents, options)
    if len(documents) < _FEW_DOCUMENTS:
        note(f"only {len(documents)} documents, which are halved: errors over so few are rough")
    path = store or _beside(choice)
    with verbs.plan(choice, options) as plan:
        key = look_key(sweeping.merge_key(plan), documents, Budget())
    with Store(path) as kept:
        kept.prepare()
        known = kept.get(key, LOOKS)
    return Planned(choice=choice, options=options, documents=documents, store=path, key=key, known=known)


def _beside(choice: Choice) -> Path:
    """Where other results of the run are."""
    first = choice.paths[0]
    if choice.pattern is None and trajectory.is_checkpoint(first):
        first = first.parent
    return sweeping.store_beside(first)


def take(plan: Planned, *, quiet: bool) -> dict[str, Any]:
    """The look as plain values, taken and kept unless it is known."""
    if plan.known is not None:
        return plan.known
    if quiet:
        taken = verbs.look(plan.choice, plan.documents, plan.options)
    else:
        with progress("looking", 1) as bar:
            taken = verbs.look(plan.choice, plan.documents, plan.options, progress=bar)
    value = taken.to_json()
    with Store(plan.store) as kept:
        kept.put(plan.key, LOOKS, merge={"steps": list(taken.steps)}, result=value)
    return value


def show(plan: Planned, look: dict[str, Any]) -> None:
    """Print it for people."""
    from pma.reporting.look_words import line_table, look_words, reading

    with reading(plan.store):
        columns, rows = line_table(look)
        words = look_words(look)
        advised = look["line"]["t"]
        weights = ",".join(f"{weight:.10g}" for weight in look["line_weights"])
    say()
    say("The line from last (t = 0) through the merge (t = 1):")
    table(columns, rows)
    for paragraph in words:
        say(paragraph)
    if advised not in (0, 1):
        say(f"To write it: {_merge_command(plan.choice)} --weights={weights} -o OUT")
    if plan.known is not None:
        say(f"Known before, from {plan.store}.")
    say(f"Charts: pma report {shlex.quote(str(plan.choice.paths[0]))}")


def _merge_command(choice: Choice) -> str:
    words = ["pma", "merge", *(shlex.quote(str(path)) for path in choice.paths)]
    window = choice.window
    if choice.preset:
        words.append("--preset")
    if window is not None:
        words += ["--last", str(window.last)]
        if window.every is not None:
            every = window.every
            words += ["--every", str(every.count) if isinstance(every, Steps) else distance_flag(every)]
    at = choice.at if window is None else window.at
    return " ".join([*words, *([] if at is None else ["--at", str(at)])])
