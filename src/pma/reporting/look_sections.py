"""The part of a report that is called diagnosis: a look around a merge in words, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pma.analysis.keeping import LOOKS
from pma.reporting.charts import require_altair
from pma.reporting.look_charts import directions_chart, experts_chart, line_chart, plane_chart
from pma.reporting.look_words import (
    Plain,
    bending_words,
    experts_words,
    line_words,
    missing_words,
    plane_words,
    reading,
    shown,
    text_words,
)
from pma.reporting.page import Section
from pma.results import STORE_FILE, Store


def kept_sections(run: Path) -> list[Section]:
    """The newest look that is kept of a run; none where there is none. Raises FormatError where it cannot be
    read.
    """
    path = run / STORE_FILE
    with Store(path) as store:
        kept = store.rows(LOOKS)
    if not kept:
        return []
    invalid = require_altair().utils.schemapi.SchemaValidationError
    with reading(path):
        sections = look_sections(kept[-1].result)
        try:
            for section in sections:
                section.chart.to_dict()  # what cannot be drawn shows here
        except invalid as error:
            raise ValueError(str(error)) from error
    return sections


def look_sections(look: Plain) -> list[Section]:
    """A section for each part that is there. `look`: as `Look.to_json` tells it."""
    line, bending = look["line"], look["bending"]
    bars = "Bars: the 95% interval of the gain over last, paired by document."
    first = Section(
        heading="Diagnosis: the line from last through the merge",
        paragraphs=[text_words(look), *line_words(look), bars, *missing_words(look)],
        chart=line_chart(line, bending),
    )
    parts = [first]
    if bending is not None:
        parts.append(_bending(look))
    if look["contours"] is not None:
        heading = "Diagnosis: the plane of merge and last"
        words = "Checkpoints are projected onto the plane; axes are distances in the space of parameters."
        chart = plane_chart(look["contours"])
        parts.append(Section(heading=heading, paragraphs=[plane_words(look), words], chart=chart))
    if look["experts"] is not None:
        parts.append(_experts(look))
    return parts


def _bending(look: Plain) -> Section:
    bending = look["bending"]
    explained = (
        "Directions: those in which the window's checkpoints vary most about the merge, pointing to last's "
        "side; their parts of the gain add up to it. Bars: 95% intervals over parts of the text."
    )
    rows = [
        [
            "–" if row["step"] is None else f"step {row['step']:,}",
            f"{row['distance']:.4g}",
            shown(row["slope"]),
            shown(row["half_curvature"]),
        ]
        for row in bending["deviations"]
    ]
    return Section(
        heading="Diagnosis: slopes and curvatures",
        paragraphs=[bending_words(look), explained],
        columns=("from the merge to", "distance", "slope", "half the curvature"),
        rows=rows,
        chart=directions_chart(bending["directions"]),
    )


def _experts(look: Plain) -> Section:
    experts = look["experts"]
    explained = (
        "Evenness: entropy of the experts' loads over that of equal loads. Heaviest: the largest load, in "
        "multiples of the mean."
    )
    columns = [experts[who][what] for what in ("entropy", "heaviest") for who in ("last_load", "merge_load")]
    return Section(
        heading="Diagnosis: routing of experts",
        paragraphs=[experts_words(look), explained],
        columns=("layer", "last: evenness", "merge: evenness", "last: heaviest", "merge: heaviest"),
        rows=_loads(columns),
        chart=experts_chart(experts),
    )


def _loads(columns: Sequence[Sequence[float]]) -> list[list[str]]:
    return [
        [str(layer), f"{a:.3f}", f"{b:.3f}", f"{c:.2f}", f"{d:.2f}"]
        for layer, (a, b, c, d) in enumerate(zip(*columns, strict=True), 1)
    ]
