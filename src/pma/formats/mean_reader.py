"""A checkpoint whose weights are read from the interval mean that is stored beside it, everything else from
itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property

from blake3 import blake3

from pma.errors import MismatchError, printable
from pma.formats import interval_mean
from pma.formats.contracts import CheckpointReader, ReadRequest
from pma.formats.runs import Runs
from pma.types import Box, DType, FileIdentity, Fragment, Role, TensorSpec

_LISTED = 5


class MeanReader:
    """The checkpoint of `inner`, its tensors `names` as `mean` has them, in fp32. Implements
    `CheckpointReader`.

    Raises MismatchError, naming tensors, where the mean lacks one of them, has one that the checkpoint does
    not hold, or one of another shape or type.
    """

    def __init__(self, inner: CheckpointReader, mean: CheckpointReader, names: Collection[str]) -> None:
        self.inner, self.mean = inner, mean
        self.format, self.path = inner.format, inner.path
        self.request_bytes, self.requests_in_flight = inner.request_bytes, inner.requests_in_flight
        self.ignored_files = inner.ignored_files
        #: name in the checkpoint -> name in the mean
        self._stored = _paired(inner, mean, names)
        self._specs = {n: self._spec(n, spec) for n, spec in inner.tensors.items()}

    @cached_property
    def layout_digest(self) -> str:
        # when asked for: distributed checkpoints read a header of each chunk for it
        digests = [self.inner.layout_digest, self.mean.layout_digest, *sorted(self._stored)]
        return blake3("\n".join(digests).encode("utf-8", "surrogatepass")).hexdigest()

    def _spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        if name not in self._stored:
            return spec
        found = self.mean.tensors[self._stored[name]]
        dtype = DType.C64 if spec.dtype.kind == "complex" else DType.F32
        for what, stored, expected in (
            ("shape", found.shape, spec.shape),
            ("dtype", found.dtype.value[0], dtype.value[0]),
        ):
            if stored != expected:
                raise MismatchError(
                    f"{printable(name)} in {_where(self.path)}: {what} {stored}, expected {expected}; "
                    "this is not the checkpoint's mean"
                )
        return replace(spec, dtype=dtype)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def is_averaged(self, name: str) -> bool:
        """Whether a tensor is read from the mean."""
        return name in self._stored

    @property
    def is_remote(self) -> bool:
        return self.inner.is_remote

    @property
    def forget_after_reading(self) -> bool:
        return self.inner.forget_after_reading

    @forget_after_reading.setter
    def forget_after_reading(self, forget: bool) -> None:
        self.inner.forget_after_reading = self.mean.forget_after_reading = forget

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        if name not in self._stored:
            return self.inner.fragments(name)
        return tuple(replace(part, tensor=name) for part in self.mean.fragments(self._stored[name]))

    def runs(self, name: str, start: int, stop: int, box: Box | None = None) -> Runs:
        if name not in self._stored:
            return self.inner.runs(name, start, stop, box)
        return self.mean.runs(self._stored[name], start, stop, box)

    def _holder(self, file: str) -> CheckpointReader:
        """Both name files relative to one folder, and the mean's are named as such."""
        return self.mean if interval_mean.is_mean(file.partition("/")[0]) else self.inner

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        for reader in (self.mean, self.inner):
            if mine := [request for request in requests if self._holder(request.file) is reader]:
                reader.read_many(mine)

    def descriptor(
        self, file: str, offset_bytes: int, length_bytes: int
    ) -> AbstractContextManager[int] | None:
        return self._holder(file).descriptor(file, offset_bytes, length_bytes)

    def side_files(self) -> Mapping[str, bytes]:
        return self.inner.side_files()

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        return self.inner.left_out(tensors)

    def identities(self) -> tuple[FileIdentity, ...]:
        return (*self.inner.identities(), *self.mean.identities())

    def close(self) -> None:
        self.inner.close()
        self.mean.close()


def _paired(inner: CheckpointReader, mean: CheckpointReader, names: Collection[str]) -> dict[str, str]:
    """The name in the mean of each of `names`, which the checkpoint holds."""
    prefix = _prefix(inner, mean)
    own = {prefix + name: name for name in mean.tensors}
    masters = {n: s.parameter for n, s in inner.tensors.items() if s.role is Role.MASTER}
    sought = {name: masters.get(name) or name for name in names}
    missing = {name: key for name, key in sought.items() if key not in own}
    if missing:
        # weights that are tied are stored once, and the checkpoint may hold them under both names
        homes = {_home(inner, name): name for name in own}
        sought |= {n: homes[home] for n, key in missing.items() if (home := _home(inner, key)) in homes}
    lacking = [name for name in names if sought[name] not in own]
    if lacking:
        raise MismatchError(
            f"{_where(inner.path)} lacks {_listed(lacking)}, which the checkpoint holds; leave that "
            "checkpoint out, or what is missing with --exclude"
        )
    return {name: own[key] for name, key in sought.items()}


def _prefix(inner: CheckpointReader, mean: CheckpointReader) -> str:
    """What the checkpoint's names have before the model's own, under which shards are averaged: `model.`,
    say.
    """
    weights = {n for n, spec in inner.tensors.items() if spec.role in (Role.PARAMETER, Role.BUFFER)}
    some = max(mean.tensors, key=len, default="")  # few others end like it
    ends = sorted(name for name in weights if name.endswith(f".{some}"))
    for prefix in ("", *(name.removesuffix(some) for name in ends)):
        if all(prefix + name in weights for name in mean.tensors):
            return prefix
    unknown = [name for name in mean.tensors if name not in weights]
    raise MismatchError(
        f"{_where(inner.path)} holds {_listed(unknown)}, which the checkpoint does not; this is not the "
        "checkpoint's mean"
    )


def _home(reader: CheckpointReader, name: str) -> tuple[tuple[str, int, int], ...]:
    return tuple((part.file, part.offset_bytes, part.length_bytes) for part in reader.fragments(name))


def _where(checkpoint: object) -> str:
    return f"the interval mean of {checkpoint}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
