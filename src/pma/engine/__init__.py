"""plan -> stream -> commit: averaging checkpoints in bounded memory, each output whole or not there."""

from pma.cluster import NodeProgress, OnRay
from pma.engine.commit import How, Merge, is_written
from pma.engine.delivery import check_output, write
from pma.engine.means import SNAPSHOTS, stored_beside
from pma.engine.means import located as located_means
from pma.engine.memory import average
from pma.engine.plan import MergeOptions, Plan, is_mixture_of_experts, parameter_count
from pma.engine.planning import plan
from pma.engine.roofline import Roofline, measure_roofline
from pma.engine.scaling import Scaling, predict
from pma.engine.staging import built_at
from pma.engine.sweep import bytes_to_read_by, passes, sweep_digests, sweep_in_memory, sweep_to_folders
from pma.engine.together.crew import Crew, crew_from
from pma.engine.verify import Verification, verify

__all__ = [
    "SNAPSHOTS",
    "Crew",
    "How",
    "Merge",
    "MergeOptions",
    "NodeProgress",
    "OnRay",
    "Plan",
    "Roofline",
    "Scaling",
    "Verification",
    "average",
    "built_at",
    "bytes_to_read_by",
    "check_output",
    "crew_from",
    "is_mixture_of_experts",
    "is_written",
    "located_means",
    "measure_roofline",
    "parameter_count",
    "passes",
    "plan",
    "predict",
    "stored_beside",
    "sweep_digests",
    "sweep_in_memory",
    "sweep_to_folders",
    "verify",
    "write",
]
