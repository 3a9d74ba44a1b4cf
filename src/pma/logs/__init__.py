"""What a trainer logged, from whatever file it logged to, and where it broke away."""

from pma.logs.curves import TrainingCurves
from pma.logs.read import read

__all__ = ["TrainingCurves", "read"]
