"""What checkpoints and options must have in common before a merge of them is planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from pma.engine.plan import MergeOptions
from pma.errors import InputError, MismatchError, UsageError, printable
from pma.formats.contracts import CheckpointReader
from pma.types import DType, Role, TensorSpec


def check_patterns(everything: Mapping[str, TensorSpec], options: MergeOptions) -> None:
    """A pattern that matches nothing is a mistake, and so is to leave everything out."""
    if not everything:
        raise InputError("the checkpoints hold no tensor")
    check_match("--copy", options.copy, everything)
    if options.like is not None:  # left out before they were converted
        return
    check_match("--exclude", options.exclude, everything)
    if all(any(fnmatchcase(name, pattern) for pattern in options.exclude) for name in everything):
        raise UsageError("--exclude leaves no tensor to merge")


def check_training_state(newest: CheckpointReader, options: MergeOptions) -> None:
    """What was asked to be carried is there to be carried."""
    weights_only = MergeOptions()
    if not options.with_optimizer or not all(weights_only.wants(s) for s in newest.tensors.values()):
        return
    beside = "".join(f"; not read: {printable(name)}" for name in newest.ignored_files[:4])
    raise InputError(
        f"{newest.path} stores no optimizer's state that --with-optimizer or `pma init` could carry{beside}. "
        "For weights alone leave the flag out; pma init says --for ct"
    )


def check_match(flag: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    """Every pattern matches some name."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(f"{flag} {pattern!r} matches no tensor")


def check_same(
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
