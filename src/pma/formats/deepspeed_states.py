"""What the files of a DeepSpeed checkpoint hold: shapes, masters, moments, buffers, training state.
`deepspeed_files` reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pma.errors import FormatError, IncompleteError, printable
from pma.formats.torch_archive import StoredTensor
from pma.formats.unpickling import Record
from pma.types import CheckpointMeta

RANK_MODEL_FILE = re.compile(r"zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_model_states\.pt", re.ASCII)
MASTERS = "fp32"
LARGEST_COUNT = 2**62

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What else a trainer needs in order to go on: entries of the model's file, of the optimizer's, its
    parameter groups, and each trained parameter's count of steps (a number or a tensor of one element).

    `beside`: what stands beside a parameter in its universal file, such as how to cut it.
    """

    trained: Collection[str]
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    groups: Sequence[Any]
    steps: Mapping[str, Any]
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """A file of model states: shapes of the trained parameters group by group, in the order they lie in the
    flat vectors; everything that is stored whole.

    `shared`: other names of parameters. `frozen_shapes`: parameters that are not trained; `frozen`: what of
    them this file holds.
    """

    file: str
    digest: str
    values: Mapping[str, Any]
    groups: tuple[Mapping[str, Shape], ...]
    buffers: Mapping[str, StoredTensor]
    shared: Mapping[str, str]
    frozen_shapes: Mapping[str, Shape]
    frozen: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every trained parameter's shape."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    @property
    def rank_count(self) -> int | None:
        """How many ranks the optimizer's state is cut among."""
        return count_of(self.values.get("dp_world_size"))

    @property
    def meta(self) -> CheckpointMeta:
        """Steps, and tokens where Megatron-DeepSpeed's arguments say them."""
        arguments = self.values.get("args")
        named = arguments.get("consumed_train_tokens") if isinstance(arguments, Record) else None
        tokens = count_of(named) or None
        return CheckpointMeta(
            step=count_of(self.values.get("global_steps")),
            tokens=tokens,
            tokens_source=f"args.consumed_train_tokens in {self.file}" if tokens else None,
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerStates:
    """One rank's file of optimizer states.

    `vectors`: by what they are (`fp32`, `exp_avg`, …) the rank's part of each group's flat vector. `steps`:
    of each group. `alignments`: elements left free behind each parameter, by group, in stages 1 and 2.
    """

    file: str
    digest: str
    stage: int
    rank_count: int
    vectors: Mapping[str, tuple[StoredTensor, ...]]
    steps: tuple[Any, ...]
    alignments: tuple[tuple[int, ...], ...] | None
    groups: Sequence[Any]
    values: Mapping[str, Any]

    @property
    def learning_rate(self) -> float | None:
        """The rate of the first parameter group."""
        group = self.groups[0] if self.groups else None
        rate = group.get("lr") if isinstance(group, dict) else None
        return rate if isinstance(rate, float) and math.isfinite(rate) else None


def count_of(value: Any) -> int | None:
    """`value` if it is a believable count."""
    return value if type(value) is int and 0 <= value < LARGEST_COUNT else None


def by_rank(names: Sequence[str], pattern: re.Pattern[str], where: str) -> tuple[str, ...]:
    """Names that match, by the rank in them. Raises FormatError for tensor-parallel ranks, IncompleteError
    where a rank is missing.
    """
    found: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        rank = int(match[1])
        if int(match[2]):
            raise tensor_parallel(where, name)
        if rank in found:
            raise FormatError(
                f"{where}: {found[rank]} and {name} are of the same rank; remove those of an earlier attempt"
            )
        found[rank] = name
    for rank in range(len(found)):
        if rank not in found:
            raise IncompleteError(
                f"{where}: the file of rank {rank} is missing beside {next(iter(found.values()))}"
            )
    return tuple(found[rank] for rank in sorted(found))


def tensor_parallel(where: str, name: str) -> FormatError:
    """The refusal of a file that holds parts of parameters."""
    return FormatError(
        f"{where}: {printable(name)} belongs to a checkpoint of tensor-parallel ranks, which do not record "
        "how they cut a parameter; save the weights in Hugging Face's format and merge those"
    )
