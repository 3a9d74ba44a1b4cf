"""Which checkpoint of a run is what: steps, tokens, learning rates, phases, and the windows to average
over.
"""

from pma.trajectory.discover import (
    KEPT_FOLDER,
    Trajectory,
    TrajectoryPoint,
    discover,
    from_checkpoints,
    is_checkpoint,
    resolve,
)
from pma.trajectory.growing import Growing, Look
from pma.trajectory.phases import Phase
from pma.trajectory.presets import Preset, fitted, preset
from pma.trajectory.way_past import Spikes, WayPast, spikes, ways_past
from pma.trajectory.window import Window, of_one_phase, select

__all__ = [
    "KEPT_FOLDER",
    "Growing",
    "Look",
    "Phase",
    "Preset",
    "Spikes",
    "Trajectory",
    "TrajectoryPoint",
    "WayPast",
    "Window",
    "discover",
    "fitted",
    "from_checkpoints",
    "is_checkpoint",
    "of_one_phase",
    "preset",
    "resolve",
    "select",
    "spikes",
    "ways_past",
]
