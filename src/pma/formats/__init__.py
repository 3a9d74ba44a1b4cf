"""Bytes <-> named tensors, one module a format. Built-in formats first, then those of the entry-point
group `pma.formats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from pma.errors import FormatError
from pma.formats.contracts import UNFINISHED_SUFFIX, CheckpointReader

__all__ = ["UNFINISHED_SUFFIX", "is_checkpoint", "open_checkpoint"]

_BUILT_IN = ("pma.formats.safetensors",)


class FormatModule(Protocol):
    """What a module must offer to be a format."""

    FORMAT: str

    def detect(self, path: Path) -> bool:
        """Whether `path` is a checkpoint of this format, judged by names alone."""

    def open_reader(self, path: Path) -> CheckpointReader:
        """Open one; headers only."""


def _formats() -> Iterator[FormatModule]:
    for name in _BUILT_IN:
        yield import_module(name)
    # asked only when no built-in format fits: scanning the installed distributions takes tens of milliseconds
    for entry_point in entry_points(group="pma.formats"):
        yield entry_point.load()


def is_checkpoint(path: Path) -> bool:
    """Whether any known format recognises `path`."""
    return any(module.detect(path) for module in _formats())


def open_checkpoint(path: Path) -> CheckpointReader:
    """Open the checkpoint at `path` with the format that recognises it. Raises FormatError where none
    does.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    for module in _formats():
        if module.detect(path):
            return module.open_reader(path)
    what = "a folder without safetensors files" if path.is_dir() else "a file that is not *.safetensors"
    raise FormatError(
        f"{path} is {what}; expected a checkpoint, such as a folder with model.safetensors in it"
    )
