"""What a trainer logged, from whatever file it logged to, and where it broke away."""

from pma.logs.breakaways import Breakaway, Kind, breakaways
from pma.logs.curves import TrainingCurves
from pma.logs.read import read

__all__ = ["Breakaway", "Kind", "TrainingCurves", "breakaways", "read"]
