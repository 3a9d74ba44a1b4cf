"""Makes a plan from headers; nothing else is read.

Every error that can be foreseen surfaces here, before the first byte is written.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from pma import averaging, formats
from pma.engine import converting, means, optimizer_state
from pma.engine.blocks import Blocks, Policy
from pma.engine.checks import check_match, check_patterns, check_same, check_training_state
from pma.engine.memory_budget import tile_bytes_within
from pma.engine.plan import MergeOptions, Plan, Source
from pma.errors import InputError, UsageError, printable
from pma.formats import side_files
from pma.formats.contracts import CheckpointReader
from pma.formats.interval_mean import IntervalMean
from pma.remote import each_at_once
from pma.trajectory import TrajectoryPoint
from pma.types import DType, Role, TensorSpec

# what must be the same in all sources; anything else is the newest's
_COMPARED = (Role.PARAMETER, Role.BUFFER, Role.MASTER)


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
    of_N: Sequence[IntervalMean | None] = [None] * len(points)
    if options.uses_means:
        of_N = recorded = means.records(points, mixed=options.weights is not None)
        weights = means.weighed(weights, recorded) if options.weights is None else weights
    with ExitStack() as on_error:
        readers, snapshot = _open(points, options, {} if opened is None else opened, on_error)
        tensors, excluded = _chosen(readers, options)
        policies = {name: _policy(spec, options, readers[-1].path) for name, spec in tensors.items()}
        averaged = {name for name, policy in policies.items() if policy is Policy.AVERAGE}
        compared = {n: s for n, s in tensors.items() if s.role in _COMPARED or n in averaged}
        check_same(readers, compared, excluded)
        # types, files and side files are the newest checkpoint's, also where stored means are averaged
        outputs = {n: _output_spec(snapshot.tensors[n], policies[n], options.dtype) for n in tensors}
        to = options.to or ("hf" if options.like is not None else None)
        # a converted checkpoint's files are not its source's
        like = snapshot if options.like is None else None
        layout = formats.plan_layout(outputs, like, to, fresh_steps=options.moments == "reset")
        blocks = Blocks(layout, tensors, policies)
        tile_bytes = tile_bytes_within(options.memory_bytes, options.threads, merges=1)
        beside = _beside(snapshot, options.dtype)
        files = [reader.identities() for reader in readers]
        on_error.pop_all()
    return Plan(
        sources=tuple(
            Source(point=point, weight=weight, files=identity, mean=mean)
            for point, weight, identity, mean in zip(points, weights, files, of_N, strict=True)
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
        as_given=as_given,
    )


def _open(
    points: Sequence[TrajectoryPoint],
    options: MergeOptions,
    opened: MutableMapping[Path, CheckpointReader],
    on_error: ExitStack,
) -> tuple[list[CheckpointReader], CheckpointReader]:
    """Readers of what is averaged, oldest first; and of the newest checkpoint as it is, which is another one
    only where stored means are averaged.
    """
    missing = [path for path in dict.fromkeys(point.path for point in points) if path not in opened]
    opener = formats.open_resumable if options.with_optimizer else formats.open_checkpoint
    for path, reader in zip(missing, each_at_once(opener, missing), strict=True):
        opened[path] = reader
        on_error.callback(reader.close)
    readers = [opened[point.path] for point in points]
    snapshot = readers[-1]
    if options.uses_means:
        readers = means.with_means(points, readers, opened, lambda spec: _from_mean(spec, options))
    if options.like is not None:
        check_match("--exclude", options.exclude, [name for r in readers for name in r.tensors])
        readers = converting.converted(readers, options.like, options.map, options.exclude)
        (snapshot,) = (
            converting.converted([snapshot], options.like, options.map, options.exclude)
            if options.uses_means
            else readers[-1:]
        )
    return readers, snapshot


def _chosen(
    readers: Sequence[CheckpointReader], options: MergeOptions
) -> tuple[dict[str, TensorSpec], tuple[str, ...]]:
    """The newest checkpoint's tensors that the output has, and the names of those that are left out."""
    newest = readers[-1]
    everything = {name: s for r in readers for name, s in r.tensors.items() if options.wants(s)}
    check_patterns(everything, options)
    check_training_state(newest, options)
    excluded = converting.left_out(newest)
    if options.like is None:
        excluded = tuple(n for n in everything if any(fnmatchcase(n, p) for p in options.exclude))
    unwanted = set(excluded)
    return {n: s for n, s in newest.tensors.items() if n in everything and n not in unwanted}, excluded


def _from_mean(spec: TensorSpec, options: MergeOptions) -> bool:
    """Whether a tensor of a checkpoint is to be read from its stored mean."""
    not_so = (*options.exclude, *options.copy)
    averaged = spec.role in _COMPARED and spec.dtype.averaged and options.wants(spec)
    return averaged and not any(fnmatchcase(spec.name, pattern) for pattern in not_so)


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
            f"{unknown} does not record its step, and {options.scheme_text} weighs checkpoints by their "
            "order; "
            "say --as-given if they are named oldest first"
        )
    return [float(weight) for weight in weights_N]


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
    return Policy.AVERAGE if spec.dtype.averaged else Policy.COPY_NEWEST


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
