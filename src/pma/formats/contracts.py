"""What a checkpoint format gives the rest of PMA: a module that offers what `FormatModule` lists.

A format says where bytes lie, in what it reads and in what is to be written; it moves none but headers. The
conformance suites in `pma.testing` hold each of them to what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from re import Pattern
from typing import Protocol

from pma.formats.runs import Runs
from pma.types import Box, CheckpointMeta, FileIdentity, Fragment, Layout, TensorSpec

#: how the name of a folder ends whose output is not finished; nothing in it counts as a checkpoint
UNFINISHED_SUFFIX = ".pma-partial"
#: in a store, where nothing can be renamed: lies in an output until its `pma.json` is there
UNFINISHED_FILE = ".pma-unfinished"


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """`len(into)` bytes of `file` from `offset_bytes`, into a writable buffer."""

    file: str
    offset_bytes: int
    into: memoryview


class CheckpointReader(Protocol):
    """Named tensors of one checkpoint, read by position. Opening reads headers only; every method is
    thread-safe.
    """

    format: str
    path: Path
    request_bytes: int
    requests_in_flight: int
    #: files beside the checkpoint's own that hold tensors too and are not part of it; a plan shows them
    ignored_files: tuple[str, ...]
    #: the same for two readers only if every tensor lies alike in files of the same names
    layout_digest: str
    #: set to leave no page of what was read in the system's cache, where the reader can
    forget_after_reading: bool

    @property
    def is_remote(self) -> bool:
        """Whether each read waits for a store, so that many should be under way at once."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every stored tensor, in the order of the format."""

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        """How tensor `name` lies on disk: fragments that cover each of its elements exactly once."""

    def runs(self, name: str, start: int, stop: int, box: Box | None = None) -> Runs:
        """Where elements `start` to `stop` lie, row-major in `box` of the tensor (None: all of it)."""

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer, coalescing neighbours. Raises IncompleteError where a file is shorter than it
        was.
        """

    def descriptor(
        self, file: str, offset_bytes: int, length_bytes: int
    ) -> AbstractContextManager[int] | None:
        """A local file of the checkpoint, open to read those bytes of it by position in the block; None where
        it is not local.
        """

    def side_files(self) -> Mapping[str, bytes]:
        """Small files that belong beside a copy of the weights: configuration, tokenizer, custom code."""

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        """Entries that are no tensors and that an output with `tensors` in this format does without."""

    def identities(self) -> tuple[FileIdentity, ...]:
        """Size, time and header digest of each file, as they are now."""

    def close(self) -> None:
        """Release open files; the reader is not used again."""


def requests_for(runs: Runs, width_bytes: int, into: memoryview) -> list[ReadRequest]:
    """Requests that fill `into` with the elements of `runs`, of `width_bytes` each."""
    columns = (runs.first_R, runs.count_R, runs.file_R, runs.offset_R)
    return [
        ReadRequest(
            file=runs.files[file],
            offset_bytes=offset,
            into=into[first * width_bytes : (first + count) * width_bytes],
        )
        for first, count, file, offset in zip(*(column.tolist() for column in columns), strict=True)
    ]


class PartWriter(Protocol):
    """One process's hand on an output that others may write parts of at the same time."""

    def write(self, file: str, offset_bytes: int, values: memoryview) -> None:
        """Put bytes at a known place, in any order, from any thread."""

    def sync(self) -> None:
        """Make everything written through this part so far durable."""

    def close(self) -> None:
        """Let go of the files; what was not synced may be lost."""


class FormatModule(Protocol):
    """What a module must offer to be a format."""

    FORMAT: str
    #: names of checkpoints in a run; the group `step` is the step
    CHECKPOINT_NAME: Pattern[str]

    def detect(self, path: Path) -> bool:
        """Whether `path` is a checkpoint of this format, be it unfinished, judged by names alone."""

    def open_reader(self, path: Path) -> CheckpointReader:
        """Open one; headers only."""

    def read_meta(self, path: Path) -> CheckpointMeta:
        """What the checkpoint's own records say; opens no file with weights."""

    def plan_layout(self, tensors: Mapping[str, TensorSpec], like: CheckpointReader | None) -> Layout:
        """Where an output's tensors go. `like`: the newest source, of this format, whose files and shards
        are kept.

        `tensors` may be fewer and of another type than in `like`. In a file, each tensor begins at a multiple
        of its element's size.
        """
