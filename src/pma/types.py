"""The few dataclasses that rooms share: element types, tensors, where their bytes lie, what is known of a
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Kind = str  # "float", "integer", "boolean", "complex" or "quantised"
Box = tuple[tuple[int, ...], tuple[int, ...]]  # where a box begins and its size, in elements, by dimension


class DType(Enum):
    """Element types of the safetensors specification: (name there, bits, kind). Imports neither torch nor
    numpy.

    Source: safetensors 0.8, `Dtype`. Types of 8 bits and fewer carry a scale elsewhere, so they cannot be
    averaged as they are.
    """

    BOOL = ("BOOL", 8, "boolean")
    U8 = ("U8", 8, "integer")
    I8 = ("I8", 8, "integer")
    U16 = ("U16", 16, "integer")
    I16 = ("I16", 16, "integer")
    U32 = ("U32", 32, "integer")
    I32 = ("I32", 32, "integer")
    U64 = ("U64", 64, "integer")
    I64 = ("I64", 64, "integer")
    F16 = ("F16", 16, "float")
    BF16 = ("BF16", 16, "float")
    F32 = ("F32", 32, "float")
    F64 = ("F64", 64, "float")
    C64 = ("C64", 64, "complex")
    F4 = ("F4", 4, "quantised")
    F6_E2M3 = ("F6_E2M3", 6, "quantised")
    F6_E3M2 = ("F6_E3M2", 6, "quantised")
    F8_E4M3 = ("F8_E4M3", 8, "quantised")
    F8_E5M2 = ("F8_E5M2", 8, "quantised")
    F8_E8M0 = ("F8_E8M0", 8, "quantised")
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8, "quantised")
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8, "quantised")

    @property
    def bits(self) -> int:
        return self.value[1]

    @property
    def kind(self) -> Kind:
        return self.value[2]


class Role(Enum):
    """What a stored tensor is to the model.

    A master is the fp32 copy of a parameter that an optimizer keeps, a moment what it keeps beside. Opaque
    are bytes that belong with the weights and are carried unopened, as a row of U8. Other is training state:
    step, schedule, data position.
    """

    PARAMETER = "parameter"
    BUFFER = "buffer"
    MASTER = "master"
    MOMENT = "moment"
    OPAQUE = "opaque"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A named tensor: its type and shape, its role, and (for a master or moment) the parameter it belongs
    to.

    `kind`: what an optimizer calls what it keeps for a parameter, such as `exp_avg` or `step`.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    role: Role = Role.PARAMETER
    parameter: str | None = None
    kind: str | None = None

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def length_bytes(self) -> int:
        return self.element_count * self.dtype.bits // 8

    @property
    def in_units(self) -> TensorSpec:
        """Itself; or, where an element is less than a byte, the tensor as a row of bytes."""
        if self.dtype.bits >= 8:
            return self
        return TensorSpec(name=self.name, dtype=DType.U8, shape=(self.length_bytes,), role=self.role)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Contiguous bytes of a file that hold part of one tensor, row-major.

    Exactly one of the two says which part: `flat_start` (the index of its first element in the flattened
    tensor) or `box` (offsets and sizes, one pair a dimension; a shard of a distributed checkpoint).
    """

    tensor: str
    file: str
    offset_bytes: int
    length_bytes: int
    flat_start: int | None = None
    box: Box | None = None

    @classmethod
    def whole(cls, spec: TensorSpec, file: str, offset_bytes: int) -> Fragment:
        """All of a tensor in one piece."""
        return cls(
            tensor=spec.name,
            file=file,
            offset_bytes=offset_bytes,
            length_bytes=spec.length_bytes,
            flat_start=0,
        )


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What tells whether a source file is still the one that was planned with.

    `mtime_ns`: its time, or for a store that keeps none a number made from what it keeps (its etag).
    """

    name: str
    size_bytes: int
    mtime_ns: int
    header_digest: str


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """What the trainer logged up to a checkpoint: (step, value) pairs, in order of step."""

    learning_rates: tuple[tuple[int, float], ...] = ()
    losses: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint's own records say. None means unknown; nothing here is guessed.

    `tokens_source` names the record that `tokens` came from. `incomplete` is None for a finished checkpoint,
    else the reason.
    """

    step: int | None = None
    tokens: int | None = None
    tokens_source: str | None = None
    learning_rate: float | None = None
    incomplete: str | None = None
    log: TrainingLog = field(default_factory=TrainingLog)


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file of an output: its size, the bytes that are known beforehand, and where tensors go."""

    name: str
    size_bytes: int
    constants: tuple[tuple[int, bytes], ...]
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every tensor of an output goes.

    `records`: small files that complete the checkpoint (an index, metadata), written after all others, in
    this order. Names may have folders in them.
    """

    tensors: Mapping[str, TensorSpec]
    files: tuple[OutputFile, ...]
    records: Mapping[str, bytes] = field(default_factory=dict)
