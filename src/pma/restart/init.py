"""A merge that training goes on from: weights and fp32 masters are averaged, moments are treated as asked
for, everything else is the newest checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from pma import engine
from pma.engine import How, Merge, MergeOptions, Plan
from pma.errors import UsageError, printable
from pma.restart.commands import how_to_go_on
from pma.restart.state import check, treated
from pma.trajectory import TrajectoryPoint

#: to go on training, or to start supervised fine-tuning or continued training with fresh training state
PURPOSES = ("resume", "sft", "ct")
#: formats whose merges without moments keep steps and schedule, and begin the optimizer anew
_BEGIN_ANEW = ("deepspeed", "deepspeed-universal")


@dataclass(frozen=True, kw_only=True)
class Restart:
    """A checkpoint to train from: where, of which step, and the command of its trainer that goes on from it.

    `kept`: of the newest checkpoint as it was; `reset`: zero; `averaged`: over the window. `notes`: what to
    mind. `merge`: what it took.
    """

    path: Path
    step: int | None
    optimizer: str | None
    resume_command: str
    kept: tuple[str, ...]
    reset: tuple[str, ...]
    averaged: tuple[str, ...]
    notes: tuple[str, ...]
    merge: Merge


def planned(
    points: Sequence[TrajectoryPoint],
    options: MergeOptions,
    *,
    optimizer: str = "newest",
    purpose: str = "resume",
    **how: Any,
) -> Plan:
    """The plan of such a checkpoint. `options`: how to average; `how`: as in `engine.plan`.

    Raises UsageError or InputError where training could not go on from it: no optimizer's state is stored, a
    mode does not suit it, the sources' states differ.
    """
    if purpose not in PURPOSES:
        raise UsageError(f"--for {purpose}: expected sft or ct")
    resuming = purpose == "resume"
    plan = engine.plan(points, replace(options, with_optimizer=resuming, moments=optimizer), **how)
    try:
        if resuming:
            check(plan)
        if resuming and optimizer == "reset" and plan.newest.format in _BEGIN_ANEW:
            plan.close()
            plan = engine.plan(points, options, **how)
    except BaseException:
        plan.close()
        raise
    return plan


def write(plan: Plan, out: Path, *, optimizer: str, purpose: str, **how: Unpack[How]) -> Restart:
    """Carry out what `planned` made with the same `optimizer` and `purpose`; `how` as in `engine.write`."""
    resuming = purpose == "resume"
    kept, reset, averaged = treated(plan)
    if resuming and not plan.options.with_optimizer:
        kept, reset = (*kept, "steps and schedule"), (*reset, "moments and their counts of steps")
    command, notes = how_to_go_on(plan, out, resuming=resuming)
    missing = plan.newest.left_out(plan.layout.tensors) if resuming else ()
    notes += tuple(f"left out, because it cannot be written as it was: {printable(n)}" for n in missing)
    done = engine.write(plan, out, **how)
    return Restart(
        path=out,
        step=plan.sources[-1].point.step if resuming else None,
        optimizer=optimizer if resuming else None,
        resume_command=command,
        kept=kept,
        reset=reset,
        averaged=averaged,
        notes=notes,
        merge=done,
    )
