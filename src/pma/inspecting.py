"""What a checkpoint or a run is, told without reading a tensor."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pma import engine, formats, trajectory
from pma.choosing import suggestion
from pma.engine.provenance import RECORD_FILE, load
from pma.errors import InputError
from pma.formats import interval_mean
from pma.trajectory import Trajectory


def inspect(path: Path, pattern: str | None = None) -> dict[str, Any]:
    """What a checkpoint or a run is, from headers and records alone, as plain values.

    A run has `checkpoints`, `left_out` and `suggestion`; a checkpoint has `format`, `step`, `tokens`,
    `tensors` and so on.
    """
    if pattern is not None or (path.is_dir() and not trajectory.is_checkpoint(path)):
        return _inspect_run(path, pattern)
    with closing(formats.open_checkpoint(path)) as reader:
        meta, identities, specs = formats.read_meta(path), reader.identities(), reader.tensors.values()
        return {
            "path": str(path),
            "real_path": str(path.resolve()),
            "format": reader.format,
            "merge_of": _merged_from(path),
            "interval_mean": _mean_beside(path),
            "step": meta.step,
            "tokens": meta.tokens,
            "tokens_source": meta.tokens_source,
            "learning_rate": meta.learning_rate,
            "complete": meta.incomplete is None,
            "incomplete_because": meta.incomplete,
            "parameters": engine.parameter_count(reader.tensors),
            "mixture_of_experts": engine.is_mixture_of_experts(reader.tensors),
            "bytes": sum(identity.size_bytes for identity in identities),
            "files": [identity.name for identity in identities],
            "dtypes": dict(Counter(spec.dtype.name for spec in specs)),
            "tensors": [
                {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "role": s.role.value}
                for s in specs
            ],
        }


def _inspect_run(path: Path, pattern: str | None) -> dict[str, Any]:
    found = trajectory.discover([path], pattern)
    return {
        "path": str(path),
        "checkpoints": [point.describe() for point in found.points],
        "left_out": [{"path": str(where), "reason": reason} for where, reason in found.left_out],
        "interval_means_beside": engine.stored_beside(found.points),
        "suggestion": _suggestion_or_why_not(found),
    }


def _suggestion_or_why_not(found: Trajectory) -> str:
    try:
        return suggestion(found)
    except InputError as error:
        return f"No window is suggested: {error}"


def _merged_from(path: Path) -> dict[str, Any] | None:
    """Scheme and steps of a merge of ours, from its record."""
    if not (path / RECORD_FILE).is_file():
        return None
    record = load(path)
    steps = [source.get("step") for source in record["sources"]]
    return {
        "scheme": str(record.get("scheme")),
        "use": str(record.get("use", engine.SNAPSHOTS)),
        "steps": [s if isinstance(s, int) else None for s in steps],
    }


def _mean_beside(path: Path) -> dict[str, Any] | None:
    """What the mean that is stored beside a checkpoint is of, or why that cannot be told."""
    try:
        found = interval_mean.find(path)
        return asdict(interval_mean.read_record(found)) if found is not None else None
    except InputError as error:
        return {"unusable_because": str(error)}
