"""Starting again from a merge: a checkpoint that the run's own trainer resumes from, or starts another stage
with.
"""

from pma.restart.init import PURPOSES, Restart, planned, write

__all__ = ["PURPOSES", "Restart", "planned", "write"]
