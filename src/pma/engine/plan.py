"""A plan: sources, weights, and for every output tensor what happens to it. `planning` makes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pma import formats
from pma.engine import converting, means, optimizer_state
from pma.engine.blocks import Blocks, Policy
from pma.engine.memory_budget import DEFAULT_MEMORY_BYTES, peak_memory_bytes
from pma.engine.partition import Part, block_bytes, partition
from pma.errors import UsageError
from pma.formats.contracts import CheckpointReader
from pma.formats.interval_mean import IntervalMean
from pma.trajectory import TrajectoryPoint
from pma.types import DType, FileIdentity, Layout, Role, TensorSpec


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge; every field is a flag of `pma plan` and `pma merge`.

    `scheme`: see `averaging.scheme`. `weights`: given weights, oldest first, instead of a scheme. `dtype`:
    element type of averaged tensors, the inputs' own by default. `exclude`, `copy`: patterns of tensor names
    to leave out, or to take from the newest checkpoint. `with_optimizer`: average the optimizer's masters
    too and carry the rest of the newest checkpoint's training state; left out otherwise. `moments`: what then
    becomes of what the optimizer keeps beside (`optimizer_state.MODES`). `to`: the output's
    format, the newest checkpoint's own by default. `like`: a Hugging Face model folder; tensors get the
    names, order and shapes of that model, by `map` (a built-in one or a file; by default the only one that
    fits), and `exclude` then means tensors of the sources. `use`: average the checkpoints' own weights,
    `snapshots`, or the means over the steps before each that are stored beside them, `interval-means`.
    """

    scheme: str = "sma"
    weights: tuple[float, ...] | None = None
    dtype: DType | None = None
    exclude: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()
    with_optimizer: bool = False
    moments: str = "newest"
    to: str | None = None
    like: Path | None = None
    map: str | None = None
    use: str = means.SNAPSHOTS
    allow_nonfinite: bool = False
    threads: int = 2
    memory_bytes: int = DEFAULT_MEMORY_BYTES

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype.kind != "float":
            raise UsageError(f"--dtype {self.dtype.name}: averages can be kept as F16, BF16, F32 or F64")
        if self.map is not None and self.like is None:
            raise UsageError(f"--map {self.map} needs --like FOLDER, the model that the tensors become")
        if self.like is not None and self.with_optimizer:
            raise UsageError("--with-optimizer keeps a trainer's own state; --like FOLDER leaves it behind")
        if self.use not in means.USES:
            raise UsageError(f"--use {self.use!r} is not known; there are {', '.join(means.USES)}")
        if self.uses_means and self.like is not None and self.copy:
            raise UsageError("--copy does not go with both --like and --use interval-means")
        if self.moments not in optimizer_state.MODES:
            raise UsageError(
                f"--optimizer {self.moments}: expected one of {', '.join(optimizer_state.MODES)}"
            )
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least one is needed")

    @property
    def uses_means(self) -> bool:
        """Whether stored means are averaged and not the checkpoints' own weights."""
        return self.use == means.INTERVAL_MEANS

    @property
    def scheme_text(self) -> str:
        """What gives the weights, in words."""
        return "given weights" if self.weights is not None else self.scheme

    def wants(self, spec: TensorSpec) -> bool:
        """Whether a tensor belongs in the output at all, other than by its name."""
        return self.with_optimizer or spec.role in (Role.PARAMETER, Role.BUFFER, Role.OPAQUE)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checkpoint of a plan, its weight, and its files as they were when planned. `mean`: what its stored
    mean is of, where that is averaged.
    """

    point: TrajectoryPoint
    weight: float
    files: tuple[FileIdentity, ...]
    mean: IntervalMean | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything needed to carry out a merge. Holds open readers: close it, or use it in a `with` block."""

    sources: tuple[Source, ...]
    readers: tuple[CheckpointReader, ...]
    options: MergeOptions
    tensors: Mapping[str, TensorSpec]
    policies: Mapping[str, Policy]
    excluded: tuple[str, ...]
    layout: Layout
    blocks: Blocks
    tile_bytes: int
    side_files: Mapping[str, bytes]
    left_out: tuple[tuple[Path, str], ...] = ()
    as_given: bool = False

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(source.weight for source in self.sources)

    @property
    def newest(self) -> CheckpointReader:
        return self.readers[-1]

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size_bytes for file in self.layout.files)

    @property
    def bytes_to_read(self) -> int:
        return self.bytes_of(Policy.AVERAGE) * len(self.sources) + self.bytes_of(Policy.COPY_NEWEST)

    def bytes_of(self, policy: Policy) -> int:
        """Bytes, in one source, of the tensors of that policy."""
        return sum(self.tensors[name].length_bytes for name, p in self.policies.items() if p is policy)

    @property
    def peak_memory_bytes(self) -> int:
        workers = min(self.options.threads, max(len(self.blocks), 1))
        names = sum(len(reader.tensors) for reader in self.readers)
        from_stores = any(reader.is_remote for reader in self.readers)
        return peak_memory_bytes(self.tile_bytes, workers, merges=1, names=names, from_stores=from_stores)

    def partition(
        self, parts: int, *, whole_files: bool = False, done: Collection[tuple[str, int]] = ()
    ) -> list[Part]:
        """The blocks in `parts` parts that several processes can each stream; see `partition.partition`.

        `done`: chunks (file and number) that an earlier attempt finished, and that are not counted.
        """
        moved = block_bytes(self.layout, self.tensors, self.policies, len(self.sources))
        firsts = {file.name: int(n) for file, n in zip(self.layout.files, moved.first_F, strict=False)}
        missing = moved.without([firsts[file] + number for file, number in done])
        return partition(missing, parts, whole_files=whole_files)

    def resharded(self, files: int) -> Plan:
        """The same merge into `files` files, where it has fewer and the output's format can do that."""
        layout = formats.in_files(self.layout, files)
        if layout is self.layout:
            return self
        return replace(self, layout=layout, blocks=Blocks(layout, self.tensors, self.policies))

    def close(self) -> None:
        """Release open files."""
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What the merge would do, as plain values for a table or JSON."""
        groups: dict[str, list[str]] = {policy.value: [] for policy in Policy}
        for name, policy in self.policies.items():
            groups[policy.value].append(name)
        groups["excluded"] = list(self.excluded)
        used = [source.mean for source in self.sources if source.mean is not None]
        return {
            "scheme": self.options.scheme_text,
            "use": self.options.use,
            "interval_means": means.described(used) if used else None,
            "interval_means_beside": means.stored_beside([source.point for source in self.sources]),
            "sources": [_described(source) for source in self.sources],
            "left_out": [{"path": str(path), "reason": reason} for path, reason in self.left_out],
            "ignored_files": [f"{r.path / name}" for r in self.readers for name in r.ignored_files],
            "tensors": {policy: len(names) for policy, names in groups.items()},
            "copied": groups["copy newest"],
            "excluded": groups["excluded"],
            "training_state_left_out": sum(
                not self.options.wants(spec) for spec in converting.stored_tensors(self.newest).values()
            ),
            "entries_left_out": list(self.newest.left_out(self.layout.tensors)),
            "parameters": parameter_count(self.tensors),
            "conversion": converting.record(self.newest),
            "output_dtypes": sorted({spec.dtype.value[0] for spec in self.layout.tensors.values()}),
            "output_files": [file.name for file in self.layout.files],
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "seconds_at_1GB_per_second": round((self.bytes_to_read + self.bytes_to_write) / 1e9, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "threads": self.options.threads,
        }


def parameter_count(tensors: Mapping[str, TensorSpec]) -> int:
    """Elements of all floating tensors of the model itself."""
    floating = [s for s in tensors.values() if s.dtype.kind not in ("integer", "boolean")]
    return sum(s.element_count for s in floating if s.role in (Role.PARAMETER, Role.BUFFER))


def is_mixture_of_experts(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether some tensor belongs to an expert, judged by its name."""
    return any(".experts." in name or ".experts_" in name for name in tensors)


def _described(source: Source) -> dict[str, Any]:
    size_bytes = sum(file.size_bytes for file in source.files)
    mean = asdict(source.mean) if source.mean is not None else None
    return {
        **source.point.describe(),
        "weight": source.weight,
        "bytes": size_bytes,
        "interval_mean": mean,
    }
