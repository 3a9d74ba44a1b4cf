"""A plan: sources, weights, and for every output tensor what happens to it. Made from headers; nothing else
is read.

Every error that can be foreseen surfaces here, before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from pma import averaging, formats
from pma.engine import converting, optimizer_state
from pma.engine.blocks import Blocks, Policy
from pma.engine.memory_budget import DEFAULT_MEMORY_BYTES, peak_memory_bytes, tile_bytes_within
from pma.errors import InputError, MismatchError, UsageError, printable
from pma.formats import side_files
from pma.formats.contracts import CheckpointReader
from pma.remote import each_at_once
from pma.trajectory import TrajectoryPoint
from pma.types import DType, FileIdentity, Layout, Role, TensorSpec

# what must be the same in all sources; anything else is the newest's
_COMPARED = (Role.PARAMETER, Role.BUFFER, Role.MASTER)


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
    fits), and `exclude` then means tensors of the sources.
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
        if self.to is not None and self.with_optimizer:
            raise UsageError("--with-optimizer keeps a trainer's own state; --to FORMAT leaves it behind")
        if self.moments not in optimizer_state.MODES:
            raise UsageError(
                f"--optimizer {self.moments}: expected one of {', '.join(optimizer_state.MODES)}"
            )
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least one is needed")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checkpoint of a plan, its weight, and its files as they were when planned."""

    point: TrajectoryPoint
    weight: float
    files: tuple[FileIdentity, ...]


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

    def partition(self, parts: int) -> list[range]:
        """The numbers of the blocks in `parts` runs of about equal bytes; several processes can each stream
        one.
        """
        cuts = [len(self.blocks) * part // parts for part in range(parts + 1)]
        return [range(start, stop) for start, stop in pairwise(cuts)]

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
        return {
            "scheme": _scheme_text(self.options),
            "sources": [_described(source) for source in self.sources],
            "left_out": [{"path": str(path), "reason": reason} for path, reason in self.left_out],
            "ignored_files": [f"{r.path / name}" for r in self.readers for name in r.ignored_files],
            "tensors": {policy: len(names) for policy, names in groups.items()},
            "copied": groups["copy newest"],
            "excluded": groups["excluded"],
            "training_state_left_out": sum(
                not _wanted(spec, self.options) for spec in converting.stored_tensors(self.newest).values()
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


def plan(
    points: Sequence[TrajectoryPoint],
    options: MergeOptions | None = None,
    *,
    as_given: bool = False,
    left_out: Sequence[tuple[Path, str]] = (),
    opened: MutableMapping[Path, CheckpointReader] | None = None,
) -> Plan:
    """Plan the merge of `points`, oldest first. `opened`: readers to share with other plans, by path.

    Raises UsageError for weights that cannot be meant, InputError (MismatchError, FormatError,
    IncompleteError) for checkpoints that do not fit together or cannot be read.
    """
    options = options or MergeOptions()
    weights = _weights(points, options, as_given=as_given)
    with ExitStack() as on_error:
        opened = {} if opened is None else opened
        missing = [path for path in dict.fromkeys(point.path for point in points) if path not in opened]
        opener = formats.open_resumable if options.with_optimizer else formats.open_checkpoint
        for path, reader in zip(missing, each_at_once(opener, missing), strict=True):
            opened[path] = reader
            on_error.callback(reader.close)
        readers = [opened[point.path] for point in points]
        if options.like is not None:
            _check_match("--exclude", options.exclude, [name for r in readers for name in r.tensors])
            readers = converting.converted(readers, options.like, options.map, options.exclude)
        newest = readers[-1]
        everything = {name: s for r in readers for name, s in r.tensors.items() if _wanted(s, options)}
        _check_patterns(everything, options)
        excluded = converting.left_out(newest)
        if options.like is None:
            excluded = tuple(n for n in everything if any(fnmatchcase(n, p) for p in options.exclude))
        unwanted = set(excluded)
        tensors = {n: s for n, s in newest.tensors.items() if n in everything and n not in unwanted}
        policies = {name: _policy(spec, options, newest.path) for name, spec in tensors.items()}
        averaged = {name for name, policy in policies.items() if policy is Policy.AVERAGE}
        compared = {n: s for n, s in tensors.items() if s.role in _COMPARED or n in averaged}
        _check_same(readers, compared, excluded)
        outputs = {name: _output_spec(spec, policies[name], options.dtype) for name, spec in tensors.items()}
        to = options.to or ("hf" if options.like is not None else None)
        # a converted checkpoint's files are not its source's
        like = newest if options.like is None else None
        layout = formats.plan_layout(outputs, like, to, fresh_steps=options.moments == "reset")
        blocks = Blocks(layout, tensors, policies)
        tile_bytes = tile_bytes_within(options.memory_bytes, options.threads, merges=1)
        beside = _beside(newest, options.dtype)
        files = [reader.identities() for reader in readers]
        on_error.pop_all()
    return Plan(
        sources=tuple(
            Source(point=point, weight=weight, files=identity)
            for point, weight, identity in zip(points, weights, files, strict=True)
        ),
        readers=tuple(readers),
        options=options,
        tensors=tensors,
        policies=policies,
        excluded=excluded,
        layout=layout,
        blocks=blocks,
        tile_bytes=tile_bytes,
        side_files=beside,
        left_out=tuple(left_out),
    )


def parameter_count(tensors: Mapping[str, TensorSpec]) -> int:
    """Elements of all floating tensors of the model itself."""
    floating = [s for s in tensors.values() if s.dtype.kind not in ("integer", "boolean")]
    return sum(s.element_count for s in floating if s.role in (Role.PARAMETER, Role.BUFFER))


def _wanted(spec: TensorSpec, options: MergeOptions) -> bool:
    return options.with_optimizer or spec.role in (Role.PARAMETER, Role.BUFFER, Role.OPAQUE)


def is_mixture_of_experts(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether some tensor belongs to an expert, judged by its name."""
    return any(".experts." in name or ".experts_" in name for name in tensors)


def _weights(points: Sequence[TrajectoryPoint], options: MergeOptions, *, as_given: bool) -> list[float]:
    steps = [point.step for point in points]
    if options.weights is not None:
        if len(options.weights) != len(points):
            raise UsageError(f"--weights gives {len(options.weights)} numbers for {len(points)} checkpoints")
        weights_N = averaging.given(options.weights)
    else:
        scheme = averaging.scheme(options.scheme)
        known = [float(step) for step in steps if step is not None]
        # without steps the order given stands in for them, evenly spaced; that is only allowed as asked for
        positions = (
            known if len(known) == len(points) and not as_given else [float(i) for i in range(len(points))]
        )
        weights_N = scheme(positions)
    if None in steps and not as_given and not averaging.equal(weights_N):
        unknown = next(point.path for point in points if point.step is None)
        raise UsageError(
            f"{unknown} does not record its step, and {_scheme_text(options)} weighs checkpoints by their "
            "order; "
            "say --as-given if they are named oldest first"
        )
    return [float(weight) for weight in weights_N]


def _check_patterns(everything: Mapping[str, TensorSpec], options: MergeOptions) -> None:
    """A pattern that matches nothing is a mistake, and so is to leave everything out."""
    if not everything:
        raise InputError("the checkpoints hold no tensor")
    _check_match("--copy", options.copy, everything)
    if options.like is not None:  # left out before they were converted
        return
    _check_match("--exclude", options.exclude, everything)
    if all(any(fnmatchcase(name, pattern) for pattern in options.exclude) for name in everything):
        raise UsageError("--exclude leaves no tensor to merge")


def _check_match(flag: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(f"{flag} {pattern!r} matches no tensor")


def _check_same(
    readers: Sequence[CheckpointReader], tensors: Mapping[str, TensorSpec], excluded: Sequence[str]
) -> None:
    """Every source holds the same tensors with the same types and shapes as the newest."""
    newest = readers[-1]
    for reader in readers[:-1]:
        for name in sorted(tensors.keys() - reader.tensors.keys()):
            raise MismatchError(
                f"{printable(name)} is in {newest.path} but missing in {reader.path}; leave that checkpoint "
                "out, "
                "or the tensor with --exclude"
            )
        weights = {
            name for name, spec in reader.tensors.items() if spec.role in (Role.PARAMETER, Role.BUFFER)
        }
        for name in sorted(weights - tensors.keys() - set(excluded)):
            raise MismatchError(
                f"{printable(name)} is in {reader.path} but missing in {newest.path}, the newest; leave that "
                "checkpoint out, or the tensor with --exclude"
            )
        for name, spec in tensors.items():
            other = reader.tensors[name]
            if other is spec:  # from one header, parsed once
                continue
            for what in ("shape", "dtype"):
                found, expected = getattr(other, what), getattr(spec, what)
                if found != expected:
                    found, expected = (x.value[0] if isinstance(x, DType) else x for x in (found, expected))
                    raise MismatchError(
                        f"{printable(name)} in {reader.path}: {what} {found}, expected {expected} as in "
                        f"{newest.path}; "
                        "leave that checkpoint out, or the tensor with --exclude"
                    )


def _policy(spec: TensorSpec, options: MergeOptions, path: Path) -> Policy:
    if optimizer_state.is_kept_for_a_parameter(spec):
        return optimizer_state.policy_of(spec, options.moments, str(path))
    if spec.role not in _COMPARED or any(fnmatchcase(spec.name, pattern) for pattern in options.copy):
        return Policy.COPY_NEWEST
    if spec.dtype.kind == "quantised":
        raise InputError(
            f"{printable(spec.name)} in {path} is {spec.dtype.value[0]}, a quantised type whose values mean "
            "nothing "
            "without their scales; dequantise the checkpoints to bf16 first"
        )
    return Policy.AVERAGE if spec.dtype.kind in ("float", "complex") else Policy.COPY_NEWEST


def _output_spec(spec: TensorSpec, policy: Policy, dtype: DType | None) -> TensorSpec:
    if dtype is None or policy is not Policy.AVERAGE or spec.dtype.kind != "float":
        return spec
    # moments and masters keep the type that the optimizer computes with
    return replace(spec, dtype=dtype) if spec.role in (Role.PARAMETER, Role.BUFFER) else spec


def _beside(newest: CheckpointReader, dtype: DType | None) -> dict[str, bytes]:
    """The newest source's side files as they go into the output, read once: what cannot be used shows now.

    `dtype`: the output's type where it is not the sources' own. It is then put into config.json, because
    transformers loads weights in the type that the configuration names.
    """
    files = newest.side_files()
    if dtype is None:
        return dict(files)
    return side_files.with_dtype(files, dtype, str(newest.path / "config.json"))


def _scheme_text(options: MergeOptions) -> str:
    return "given weights" if options.weights is not None else options.scheme


def _described(source: Source) -> dict[str, Any]:
    size_bytes = sum(file.size_bytes for file in source.files)
    return {**source.point.describe(), "weight": source.weight, "bytes": size_bytes}
