"""Writing a merge: checks, hidden folder, stream, provenance, rename. Whatever happens before, nothing
looks complete.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma.engine import provenance, side_files
from pma.engine.plan import Plan
from pma.engine.staging import leftover_bytes, refuse_existing, staged
from pma.engine.stream import Progress, stream
from pma.errors import SpaceError, UsageError
from pma.formats.hf_trainer import STATE_FILE
from pma.formats.safetensors import SafetensorsWriter
from pma.quantities import bytes_text

# names that trainers take for their own checkpoints and resume from, or delete
_TRAINER_NAME = re.compile(r"checkpoint-\d+|step-?\d+|iter_\d+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge that was written: where, from how many checkpoints, and what it took."""

    path: Path
    checkpoints: int
    scheme: str
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]


def check_output(plan: Plan, out: Path, *, inside_run: bool = False) -> tuple[str, ...]:
    """Refuse an output that exists, lies inside the run, or finds no room; returns warnings about its
    name.
    """
    refuse_existing(out)
    target = Path(os.path.realpath(out))
    for folder in _as_named_and_as_resolved(plan):
        run = folder.parent
        inside_checkpoint = folder == target or folder in target.parents
        if inside_checkpoint or (run in target.parents and not inside_run and _is_run(run)):
            raise UsageError(
                f"{out} lies inside the run {run}, whose trainer may resume from it or delete it; "
                "choose a folder outside" + ("" if inside_checkpoint else ", or say --inside-run")
            )
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"{out} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{out} cannot be made: {existing} is not writable")
    free = shutil.disk_usage(existing).free + leftover_bytes(out)
    if free < plan.bytes_to_write:
        raise SpaceError(
            f"{existing} has {bytes_text(free)} free, the output needs {bytes_text(plan.bytes_to_write)}; "
            "free some space or choose another place"
        )
    if _TRAINER_NAME.search(out.name):
        return (
            f"{out.name} is named like a trainer's checkpoint; keep it out of folders that trainers resume "
            "from",
        )
    return ()


def _as_named_and_as_resolved(plan: Plan) -> set[Path]:
    """The sources' folders; where one is a symbolic link, both it (its parent made absolute) and where it
    leads.
    """
    paths = [source.point.path for source in plan.sources]
    named = {Path(os.path.realpath(path.parent)) / path.name for path in paths}
    return named | {Path(os.path.realpath(path)) for path in paths}


def _is_run(folder: Path) -> bool:
    inside = [entry for entry in folder.iterdir() if entry.is_dir()]
    return any(_TRAINER_NAME.fullmatch(entry.name) or (entry / STATE_FILE).is_file() for entry in inside)


def write(
    plan: Plan,
    out: Path,
    *,
    inside_run: bool = False,
    sha256: bool = False,
    hash_sources: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Carry out `plan` into the new folder `out`.

    Raises UsageError where `out` exists, SpaceError, MismatchError where a source changed meanwhile,
    Interrupted. `sha256` adds standard digests of the output, `hash_sources` of the sources, both by reading
    them again.
    """
    warnings = check_output(plan, out, inside_run=inside_run)
    copied = side_files.read(plan.sources[-1].point.path, plan.options.dtype)
    started = time.monotonic()
    # what takes long to import comes before anything is on disk: a signal amid it may abort the process
    import pma.engine.compute  # noqa: F401

    with staged(out) as folder:
        writer = SafetensorsWriter(folder)
        writer.create(plan.layout)
        part = writer.open_part()
        try:
            digests = stream(plan, plan.blocks, part, progress)
        finally:
            part.close()
        provenance.check_unchanged(plan)
        writer.finish()
        for name, data in copied.items():
            writer.write_bytes(name, data)
        origins = {name: os.path.realpath(plan.sources[-1].point.path / name) for name in copied}
        value = provenance.record(plan, digests, folder, origins, add_sha256=sha256)
        if hash_sources:
            _add_source_digests(value)
        writer.write_bytes(provenance.RECORD_FILE, provenance.encode(value))
    return Merge(
        path=out,
        checkpoints=len(plan.sources),
        scheme=value["scheme"],
        bytes_read=plan.bytes_to_read,
        bytes_written=plan.bytes_to_write,
        seconds=time.monotonic() - started,
        warnings=warnings,
    )


def _add_source_digests(value: dict[str, Any]) -> None:
    for source in value["sources"]:
        for file in source["files"]:
            file["sha256"] = provenance.sha256(Path(source["folder"]) / file["name"])
