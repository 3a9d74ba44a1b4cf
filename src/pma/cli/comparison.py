"""The table of models compared, on a terminal."""

from __future__ import annotations

from typing import Any

from pma.cli.output import table
from pma.reporting import comparison_table


def show_comparison(rows: list[dict[str, Any]]) -> None:
    """Print rows as `evaluation.compare` makes them."""
    table(*comparison_table(rows))
