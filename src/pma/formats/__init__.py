"""Bytes <-> named tensors, one module a format. Built-in formats first, then those of the entry-point
group `pma.formats`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from re import Match
from typing import cast

from pma.errors import FormatError, UsageError
from pma.formats import hf_trainer, interval_mean
from pma.formats.contracts import UNFINISHED_FILE, UNFINISHED_SUFFIX, CheckpointReader, FormatModule
from pma.formats.state_beside import WithState
from pma.types import CheckpointMeta, Layout, Role, TensorSpec

__all__ = [
    "UNFINISHED_SUFFIX",
    "in_files",
    "is_checkpoint",
    "named_step",
    "open_checkpoint",
    "open_resumable",
    "plan_layout",
    "read_meta",
]

_TRAINING = (Role.MASTER, Role.MOMENT, Role.OTHER)
_ALSO_NAMED = {"hf": "safetensors"}
# in the order in which they are asked: folders of most have lone .pt files beside
_BUILT_IN = (
    "pma.formats.dcp_safetensors",
    "pma.formats.safetensors",
    "pma.formats.megatron",
    "pma.formats.dcp",
    "pma.formats.deepspeed",
    "pma.formats.deepspeed_universal",
    "pma.formats.torch_files",
)


def _formats() -> Iterator[FormatModule]:
    for name in _BUILT_IN:
        yield cast(FormatModule, import_module(name))
    # asked only when no built-in format fits: scanning the installed distributions takes tens of milliseconds
    for entry_point in entry_points(group="pma.formats"):
        yield entry_point.load()


def _format_of(path: Path) -> FormatModule | None:
    if interval_mean.is_mean(path.name):
        return None
    return next((module for module in _formats() if module.detect(path)), None)


def is_checkpoint(path: Path) -> bool:
    """Whether any known format recognises `path`."""
    return _format_of(path) is not None


def named_step(name: str) -> int | None:
    """The step in the name of a checkpoint, as some trainer names them; None for any other name."""
    for module in _formats():
        found: Match[str] | None = module.CHECKPOINT_NAME.fullmatch(name)
        if found is not None:
            return int(found["step"])
    return None


def open_checkpoint(path: Path) -> CheckpointReader:
    """Open the checkpoint at `path` with the format that recognises it. Raises FormatError where none
    does.
    """
    return _recognised(path).open_reader(path)


def open_resumable(path: Path) -> CheckpointReader:
    """As `open_checkpoint`, with the training state that its trainer keeps in files beside the weights."""
    module = _recognised(path)
    reader: CheckpointReader = getattr(module, "open_resumable", module.open_reader)(path)
    return reader


def _recognised(path: Path) -> FormatModule:
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    module = _format_of(path)
    if module is not None:
        return module
    if interval_mean.is_mean(path.name):
        raise FormatError(
            f"{path} is the interval mean of a checkpoint; name the checkpoint, or the run, and say "
            "--use interval-means"
        )
    what = "a folder without files of a known format" if path.is_dir() else "a file of no known format"
    raise FormatError(
        f"{path} is {what}; expected a checkpoint, such as a folder with model.safetensors in it"
    )


def read_meta(path: Path) -> CheckpointMeta:
    """What the records of the checkpoint at `path` say, by the format that recognises it; where nothing
    records the step, what its name says.
    """
    if any(part.endswith(UNFINISHED_SUFFIX) for part in (path.name, path.parent.name)):
        return CheckpointMeta(incomplete="it is an output of pma that is not finished")
    if path.is_dir() and (path / UNFINISHED_FILE).is_file() and not (path / "pma.json").is_file():
        return CheckpointMeta(incomplete="it is an output of pma that is still being sent")
    module = _format_of(path)
    if module is None:
        return CheckpointMeta(incomplete="no weights are there yet")
    meta = module.read_meta(path)
    recorded = any((path / name).is_file() for name in (hf_trainer.STATE_FILE, hf_trainer.RECORD_FILE))
    if meta.step is None and meta.incomplete is None and not recorded:
        meta = replace(meta, step=named_step(path.name))
    return meta


def plan_layout(
    tensors: Mapping[str, TensorSpec],
    like: CheckpointReader | None,
    to: str | None = None,
    *,
    fresh_steps: bool = False,
) -> Layout:
    """Where an output's tensors go, in the format named `to`, or in that of `like`. Raises UsageError for a
    name that no format has. `fresh_steps`: an optimizer's counts of steps that are no tensors are zero.

    `like` tells more of the output where it is of the same format, or of one that the output's names in
    `LIKE`.
    """
    wanted = _ALSO_NAMED.get(to, to) if to is not None else like.format if like is not None else None
    module = next((module for module in _formats() if wanted == module.FORMAT), None)
    if module is None:
        known = sorted({module.FORMAT for module in _formats()} | _ALSO_NAMED.keys())
        raise UsageError(f"--to {wanted}: there are {', '.join(known)}")
    if like is not None and like.format not in getattr(module, "LIKE", (module.FORMAT,)):
        if any(spec.role in _TRAINING for spec in tensors.values()):
            raise UsageError(
                f"--to {to} has no place for the training state of {like.path}, which is of another format "
                f"({like.format}); leave out --to or --with-optimizer"
            )
        like = None
    if not isinstance(like, WithState):
        return module.plan_layout(tensors, like)
    weights: CheckpointReader = like.weights
    layout = module.plan_layout(like.of_weights(tensors), weights)
    return like.completed(layout, tensors, fresh_steps=fresh_steps)


def in_files(layout: Layout, count: int) -> Layout:
    """A layout with `count` files, where it has fewer and its format can be cut otherwise; else itself."""
    module = import_module("pma.formats.safetensors")
    found: Layout = module.in_files(layout, count)
    return found
