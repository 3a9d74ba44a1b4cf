"""`pma sweep`: a grid of windows and schemes, merged from few reads, evaluated or written.

Evaluations go into a store that is keyed by content, so that a repeated or wider sweep computes only what is
new.
"""

from pma.evaluation.making import Load
from pma.sweeping.candidates import Contender, Space, field
from pma.sweeping.evaluating import Results, evaluate, store_beside
from pma.sweeping.findings import findings
from pma.sweeping.grid import (
    Cell,
    Grid,
    Plans,
    Sweep,
    distance_text,
    merge_key,
    of_a_run,
    planned,
    planned_over,
    planner,
)
from pma.sweeping.reading import How
from pma.sweeping.rows import rows
from pma.sweeping.searching import Outcome, search
from pma.sweeping.writing import targets, unwritten, write

__all__ = [
    "Cell",
    "Contender",
    "Grid",
    "How",
    "Load",
    "Outcome",
    "Plans",
    "Results",
    "Space",
    "Sweep",
    "distance_text",
    "evaluate",
    "field",
    "findings",
    "merge_key",
    "of_a_run",
    "planned",
    "planned_over",
    "planner",
    "rows",
    "search",
    "store_beside",
    "targets",
    "unwritten",
    "write",
]
