"""What becomes of what an optimizer keeps for each parameter, by the mode that `pma init` offers.

`newest`: as the newest checkpoint has it. `second-moment`: first moments are zero, the rest is the newest's.
`average`: moments are averaged as the weights are, counts of steps are the newest's. `reset`: moments and
counts of steps are zero, as in an optimizer that has not begun.
"""

from __future__ import annotations

from pma.engine.blocks import Policy
from pma.errors import UsageError, printable
from pma.formats.optimizer_kinds import FIRST_MOMENTS, SECOND_MOMENTS, STEP
from pma.types import DType, Role, TensorSpec

MODES = ("newest", "second-moment", "average", "reset")


def is_kept_for_a_parameter(spec: TensorSpec) -> bool:
    """Whether a tensor is an optimizer's moment or count of steps; masters are averaged as weights are."""
    return spec.role is not Role.MASTER and spec.kind is not None


def policy_of(spec: TensorSpec, mode: str, where: str) -> Policy:
    """What happens to such a tensor. Raises UsageError for a kind or type that the mode cannot treat."""
    if mode == "newest":
        return Policy.COPY_NEWEST
    kind = spec.kind
    if kind == STEP and mode == "reset" and spec.dtype is DType.U8:
        raise UsageError(
            f"{printable(spec.name)} in {where} is a count of steps that is stored as an object, which is "
            "carried unopened; --optimizer reset needs one stored as a tensor, the other modes do not"
        )
    if kind == STEP:
        return Policy.ZERO if mode == "reset" else Policy.COPY_NEWEST
    if kind not in FIRST_MOMENTS | SECOND_MOMENTS:
        raise UsageError(
            f"{printable(spec.name)} in {where}: nothing is known of what an optimizer calls "
            f"{printable(str(kind))!r}, so --optimizer {mode} cannot treat it; newest takes it as it is"
        )
    if spec.dtype.kind != "float":
        raise UsageError(
            f"{printable(spec.name)} in {where} is {spec.dtype.value[0]}: --optimizer {mode} treats moments "
            "that are floating-point numbers; newest takes them as they are"
        )
    if mode == "average":
        return Policy.AVERAGE
    return Policy.ZERO if mode == "reset" or kind in FIRST_MOMENTS else Policy.COPY_NEWEST
