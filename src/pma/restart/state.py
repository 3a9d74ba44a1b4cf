"""The training state of a plan: is all of it there that a trainer needs, and what becomes of each part?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pma.engine import Plan
from pma.engine.blocks import Policy
from pma.errors import InputError, MismatchError, UsageError, printable
from pma.formats.contracts import CheckpointReader
from pma.formats.hf_trainer import STATE_FILE
from pma.formats.state_beside import WithState
from pma.formats.torch_contents import TRAINING, counts_of_steps
from pma.formats.torch_files import TorchReader
from pma.types import Role, TensorSpec

_WEIGHTS = (Role.PARAMETER, Role.BUFFER, Role.OPAQUE)


def check(plan: Plan) -> None:
    """Raises UsageError or InputError where no trainer could go on from the plan's output."""
    newest = plan.newest
    if not any(spec.role is Role.MOMENT for spec in plan.tensors.values()):
        ignored = "".join(f"; not read: {name}" for name in newest.ignored_files[:2])
        raise InputError(
            f"{newest.path} stores no optimizer's state, so a trainer cannot go on from it with --optimizer "
            f"{plan.options.moments}{ignored}. Weights alone, to start with a fresh optimizer and schedule: "
            "--for ct"
        )
    missing = [name for name in newest.left_out(plan.layout.tensors) if name in TRAINING]
    if missing:
        names = ", ".join(missing)
        raise InputError(
            f"{newest.path} holds training state that cannot be carried: {names}. Weights alone: --for ct"
        )
    if plan.options.moments == "reset":
        _check_counts(plan)
    if plan.options.moments == "average":
        _check_averages(plan)
    if isinstance(newest, WithState):
        _check_files(newest)


def _check_counts(plan: Plan) -> None:
    """Counts of steps must be where a plan can set them to zero."""
    newest = plan.newest
    if newest.format == "megatron":
        raise UsageError(
            f"{newest.path}: Megatron counts the optimizer's steps in its common state, which is carried "
            "unopened, so --optimizer reset would leave the count; second-moment, average and newest work"
        )
    found = newest.contents.values() if isinstance(newest, TorchReader) else ()
    for _, where in (count for contents in found for count in counts_of_steps(contents.value)):
        raise UsageError(
            f"{newest.path}: the count of steps {printable(where)} is a plain number, which is carried as it "
            "is, so --optimizer reset would leave it; second-moment, average and newest work"
        )


def _check_averages(plan: Plan) -> None:
    """Means of squares are no squares under weights below zero; the same place must be the same parameter."""
    if any(weight < 0 for weight in plan.weights):
        raise UsageError(
            "--optimizer average needs weights of zero or more: means of squares may not be less"
        )
    expected = _groups(_values(plan.newest))
    for reader in plan.readers[:-1]:
        if _groups(_values(reader)) != expected:
            raise MismatchError(
                f"the optimizer's state in {reader.path} has its parameters in other groups than in "
                f"{plan.newest.path}; leave that checkpoint out, or take the newest's moments with "
                "--optimizer newest"
            )


def _values(reader: CheckpointReader) -> Any:
    """What is in the files of torch.save that number an optimizer's parameters; distributed checkpoints name
    them.
    """
    if isinstance(reader, WithState):
        return reader.values
    return [found.rest for found in reader.contents.values()] if isinstance(reader, TorchReader) else None


def _groups(value: Any, depth: int = 4) -> list[Any]:
    """The parameters of each group of each optimizer, in order."""
    if not isinstance(value, (dict, list)) or not depth:
        return []
    if isinstance(value, dict) and isinstance(value.get("param_groups"), list):
        return [group.get("params") for group in value["param_groups"] if isinstance(group, dict)]
    entries = value.values() if isinstance(value, dict) else value
    return [groups for entry in entries for groups in _groups(entry, depth - 1)]


def _check_files(newest: WithState) -> None:
    if STATE_FILE in newest.copied and "scheduler.pt" not in newest.copied:
        raise InputError(
            f"{newest.path} has the optimizer's state but no scheduler.pt: the Trainer loads both or "
            "neither, and would silently begin its schedule anew. Weights alone: --for ct"
        )


def treated(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """What is kept of the newest, what is zero, what is averaged, in words."""
    counts: dict[Policy, Counter[str]] = {policy: Counter() for policy in Policy}
    for name, spec in plan.layout.tensors.items():
        counts[plan.policies[name]][_what(spec)] += 1
    kept, reset, averaged = (
        tuple(f"{what} ({count})" for what, count in counts[policy].items())
        for policy in (Policy.COPY_NEWEST, Policy.ZERO, Policy.AVERAGE)
    )
    return kept + tuple(_carried(plan)), reset, averaged


def _what(spec: TensorSpec) -> str:
    if spec.role in _WEIGHTS:
        return "weights"
    if spec.role is Role.MASTER:
        return "fp32 masters"
    return printable(spec.kind) if spec.kind is not None else "other training state"


def _carried(plan: Plan) -> Iterator[str]:
    """Small files of the newest checkpoint that go along as they are."""
    folder = plan.sources[-1].point.folder
    for name in plan.layout.records:
        hidden = name.rpartition("/")[2].startswith(".")
        if not hidden and not name.endswith("index.json") and (folder / name).is_file():
            yield printable(name)
