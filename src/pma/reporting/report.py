"""`report.html` and PNGs, from a demo's `results.json` or from a run's own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

from pma.errors import InputError
from pma.formats.strict_json import load_object
from pma.quantities import count_text
from pma.reporting.charts import Series, comparison_chart, held_out_chart, training_chart
from pma.reporting.look_sections import kept_sections
from pma.reporting.page import Section, render
from pma.reporting.table import comparison_table
from pma.trajectory import discover
from pma.types import TrainingLog

RESULTS_FILE = "results.json"
PAGE_FILE = "report.html"
_LARGEST_RESULTS_BYTES = 256 * 2**20


def report_folder(folder: Path, out: Path) -> tuple[Path, list[Path]]:
    """Write the report of `folder` into `out`; returns the page and the pictures.

    Raises InputError where `folder` is neither a demo's nor a run.
    """
    if (folder / RESULTS_FILE).is_file():
        results = load_object(folder / RESULTS_FILE, _LARGEST_RESULTS_BYTES)
        title, lead, sections = _demo_sections(results)
    else:
        title, lead, sections = _run_sections(folder)
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for section in sections:
        if section.chart is not None:
            pictures.append(out / f"{_slug(section.heading)}.png")
            section.chart.save(pictures[-1], scale_factor=2)
    page = out / PAGE_FILE
    page.write_text(render(title, lead, sections, f"pma-llm {version('pma-llm')}"), encoding="utf-8")
    return page, pictures


def _slug(heading: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in heading.lower()).split())


def series_from_log(
    name: str, kind: str, log: TrainingLog, tokens_a_step: int, *, after_step: int = 0
) -> Series:
    """A log as a series over tokens, from `after_step` on; losses that are not finite cannot be drawn."""
    return Series(
        name=name,
        kind=kind,
        losses=[
            (step * tokens_a_step, value)
            for step, value in log.losses
            if step > after_step and isfinite(value)
        ],
        learning_rates=[
            (step * tokens_a_step, value) for step, value in log.learning_rates if step > after_step
        ],
    )


def _run_sections(folder: Path) -> tuple[str, str, list[Section]]:
    found = discover([folder])
    newest = found.points[-1]
    if not found.log.losses:
        raise InputError(f"{folder} logs no loss in its trainer_state.json; there is nothing to draw")
    step, tokens = newest.step or 1, newest.tokens
    series = series_from_log(folder.name, "raw", found.log, (tokens or step) // step)
    rows = [
        (
            p.path.name,
            str(p.step),
            count_text(p.tokens) if p.tokens else "unknown",
            f"{p.learning_rate}",
            p.phase.value,
        )
        for p in found.points
    ]
    lead = f"{len(rows)} checkpoints, the newest at step {newest.step}" + (
        f" after {count_text(tokens)} tokens." if tokens else "."
    )
    undrawn = len(found.log.losses) - len(series.losses)
    notes = [f"{undrawn} logged losses are not finite and not drawn."] if undrawn else []
    sections = [
        Section(heading="Training", paragraphs=notes, chart=training_chart([series])),
        *kept_sections(folder),
        Section(heading="Checkpoints", columns=("checkpoint", "step", "tokens", "lr", "phase"), rows=rows),
    ]
    return f"Run {folder.name}", lead, sections


def _demo_sections(results: Mapping[str, Any]) -> tuple[str, str, list[Section]]:
    comparison: Sequence[Mapping[str, Any]] = results["comparison"]
    series = [Series(**item) for item in results["training"]]
    columns, rows = comparison_table(comparison)
    bars = [
        {
            "title": row["title"],
            "kind": row["kind"],
            **{k: row["improvement"][k] for k in ("value", "low", "high")},
        }
        for row in comparison
        if row["improvement"] is not None
    ]
    sections = [
        Section(
            heading="Comparison",
            paragraphs=[results["verdict"], results["protocol"]],
            columns=columns,
            rows=rows,
            chart=comparison_chart(bars),
        ),
        Section(
            heading="Held-out loss over training",
            paragraphs=[results["curve_protocol"]],
            chart=held_out_chart(results["curve"]),
        ),
        Section(
            heading="Training",
            paragraphs=["The annealed fork starts from the same checkpoint as the merge ends with."],
            chart=training_chart(series),
        ),
        Section(
            heading="Commands that repeat each step",
            commands=[(command["title"], command["line"]) for command in results["commands"]],
        ),
    ]
    return results["title"], results["lead"], sections
