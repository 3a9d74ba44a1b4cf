"""The comparison of models as rows of text, for a terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pma.quantities import count_text

_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("model", lambda row: str(row.get("title") or row["name"])),
    ("loss", lambda row: f"{row['loss']['value']:.4f}"),
    ("bits/byte", lambda row: f"{row['bits_per_byte']:.4f}"),
    ("cloze", lambda row: "" if row["cloze"] is None else f"{100 * row['cloze']:.1f}%"),
    ("better than last by", lambda row: _with_error(row["improvement"])),
    ("tokens added", lambda row: count_text(row["extra_tokens"]) if "extra_tokens" in row else ""),
    ("gain recovered", lambda row: _share(row["gain_recovered"])),
)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of rows as `evaluation.compare` makes them; columns that no row fills are left
    out.
    """
    cells = [[text(row) for _, text in _COLUMNS] for row in rows]
    used = [i for i in range(len(_COLUMNS)) if any(row[i] for row in cells)]
    return [_COLUMNS[i][0] for i in used], [[row[i] for i in used] for row in cells]


def _with_error(estimate: Mapping[str, float] | None) -> str:
    return "" if estimate is None else f"{estimate['value']:+.4f} ± {estimate['standard_error']:.4f}"


def _share(estimate: Mapping[str, float] | None) -> str:
    return (
        ""
        if estimate is None
        else f"{100 * estimate['value']:.0f}% ± {100 * estimate['standard_error']:.0f}%"
    )
