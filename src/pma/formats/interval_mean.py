"""Interval means: the mean of a run's weights over all steps since the last checkpoint, stored beside a
checkpoint.

In the checkpoint's folder lies a safetensors file (fp32, names as the checkpoint stores them, the record in
its `__metadata__`), or, where the trainer shards its weights, a folder of torch.distributed.checkpoint with
the record beside, written last. A checkpoint that is a file has a sibling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pma.errors import FormatError, printable
from pma.formats import strict_json
from pma.formats.folder import open_folder
from pma.formats.safetensors_header import read_header

if TYPE_CHECKING:
    from pma.formats.contracts import CheckpointReader

MEAN_FILE = "pma_interval_mean.safetensors"
MEAN_FOLDER = "pma_interval_mean"
#: in MEAN_FOLDER, written last
RECORD_FILE = "pma_interval_mean.json"
#: in the `__metadata__` of MEAN_FILE
METADATA_KEY = "pma_interval_mean"
VERSION = 1
#: what may have been averaged: the trainer's fp32 masters, fp32 weights, or weights of fewer bits
AVERAGED = ("masters", "weights", "rounded weights")
_LARGEST_RECORD_BYTES = 64 * 2**10
_LARGEST_COUNT = 2**62


@dataclass(frozen=True, kw_only=True)
class IntervalMean:
    """What a stored mean is of: `updates` optimizer steps, each `every`-th, from `first_step` to `last_step`
    (both are in it); `averaged` is one of `AVERAGED`.
    """

    first_step: int
    last_step: int
    updates: int
    every: int
    averaged: str

    def __post_init__(self) -> None:
        for name in ("first_step", "last_step", "updates", "every"):
            value = getattr(self, name)
            # type() and not isinstance(): JSON's true is an int to Python
            if type(value) is not int or not 0 <= value < _LARGEST_COUNT:
                raise FormatError(f"{name} is {printable(repr(value))}, expected a count")
        if self.averaged not in AVERAGED:
            found = printable(repr(self.averaged))
            raise FormatError(f"averaged is {found}, expected one of {', '.join(AVERAGED)}")
        if self.every < 1 or self.updates < 1:
            raise FormatError(f"{self.updates} updates, every {self.every} steps: both are at least 1")
        if self.last_step < self.first_step:
            raise FormatError(f"its last step {self.last_step} is before its first, {self.first_step}")
        if self.updates > self.steps_spanned:
            raise FormatError(
                f"{self.updates} updates, every {self.every} steps, do not fit in steps {self.first_step} to "
                f"{self.last_step}"
            )

    @property
    def steps_spanned(self) -> int:
        """As many updates as there are from the first step to the last, `every` so many steps."""
        return (self.last_step - self.first_step) // self.every + 1

    def to_json(self) -> str:
        """The record as it is stored."""
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> IntervalMean:
        """The record in `text`; `where` starts the message of an error. Raises FormatError for any other."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(data) > _LARGEST_RECORD_BYTES:
            raise FormatError(f"{where} has {len(data)} bytes; that is not believable for it")
        value = strict_json.parse_object(data, where)
        if type(value.get("version")) is not int or value["version"] != VERSION:
            found = printable(repr(value.get("version")))
            raise FormatError(
                f"{where}: version {found}, expected {VERSION}; a newer pma may have written it"
            )
        return cls._from_values(value, where)

    @classmethod
    def _from_values(cls, value: Mapping[str, Any], where: str) -> IntervalMean:
        expected = {"version", *(field.name for field in fields(cls))}
        for name in sorted(expected ^ value.keys()):
            what = "is missing" if name in expected else "is not known"
            raise FormatError(f"{where}: {printable(name)} {what}")
        try:
            return cls(**{name: value[name] for name in expected - {"version"}})
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None


def file_of(checkpoint: Path) -> Path:
    """Where the mean of a checkpoint lies as one file: in its folder, or beside it where it is a file."""
    if checkpoint.is_dir():
        return checkpoint / MEAN_FILE
    return checkpoint.parent / f"{checkpoint.stem}.{MEAN_FILE}"


def is_mean(name: str) -> bool:
    """Whether a file or folder is named as a stored mean, and thus is no checkpoint."""
    return name in (MEAN_FILE, MEAN_FOLDER) or name.endswith("." + MEAN_FILE)


def find(checkpoint: Path) -> Path | None:
    """The stored mean of a checkpoint: its file, or its folder once that is complete; None where there is
    none.

    Raises FormatError where there are both.
    """
    file, folder = file_of(checkpoint), checkpoint / MEAN_FOLDER
    # the folder first: in a store that is known from the checkpoint's own listing
    has_folder = folder.is_dir() and (folder / RECORD_FILE).is_file()
    if file.is_file():
        if has_folder:
            raise FormatError(
                f"{checkpoint} holds both {MEAN_FILE} and {MEAN_FOLDER}/; which is the mean? Remove the "
                "stale one"
            )
        return file
    return folder if has_folder else None


def read_record(path: Path) -> IntervalMean:
    """What the stored mean at `path` (as `find` gives it) is of. Raises FormatError or IncompleteError."""
    if path.is_dir():
        with closing(open_folder(path)) as folder:
            text: str | bytes | None = folder.read_whole(RECORD_FILE, _LARGEST_RECORD_BYTES)
        where = f"{path / RECORD_FILE}"
    else:
        with closing(open_folder(path.parent)) as folder:
            text = read_header(folder, path.name).metadata.get(METADATA_KEY)
        where = f"{path}: {METADATA_KEY} in its header"
    if text is None:
        raise FormatError(f"{where} is missing, so it cannot be told which steps it is the mean of")
    return IntervalMean.from_json(text, where)


def open_reader(path: Path) -> CheckpointReader:
    """The tensors of the stored mean at `path` (as `find` gives it), under its own names; headers only."""
    # here, because the formats import the names above
    from pma.formats import dcp, safetensors

    reader = dcp.open_mean(path) if path.is_dir() else safetensors.open_reader(path)
    return cast("CheckpointReader", reader)
