"""`pma sweep`: a grid of windows and schemes, merged from few reads, evaluated or written.

Evaluations go into a store that is keyed by content, so that a repeated or wider sweep computes only what is
new.
"""

from pma.sweeping.evaluating import Load, Results, evaluate, store_beside
from pma.sweeping.grid import Cell, Grid, Sweep, merge_key, planned, planned_over
from pma.sweeping.rows import rows
from pma.sweeping.writing import targets, unwritten, write

__all__ = [
    "Cell",
    "Grid",
    "Load",
    "Results",
    "Sweep",
    "evaluate",
    "merge_key",
    "planned",
    "planned_over",
    "rows",
    "store_beside",
    "targets",
    "unwritten",
    "write",
]
