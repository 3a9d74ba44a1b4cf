"""plan -> stream -> commit: averaging checkpoints in bounded memory, each output whole or not there."""

from pma.engine.commit import Merge, check_output, write
from pma.engine.memory import average
from pma.engine.plan import MergeOptions, Plan, is_mixture_of_experts, parameter_count, plan
from pma.engine.roofline import Roofline, measure_roofline
from pma.engine.verify import Verification, verify

__all__ = [
    "Merge",
    "MergeOptions",
    "Plan",
    "Roofline",
    "Verification",
    "average",
    "check_output",
    "is_mixture_of_experts",
    "measure_roofline",
    "parameter_count",
    "plan",
    "verify",
    "write",
]
