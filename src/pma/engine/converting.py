"""Where a plan meets a conversion: its readers as those of another model, and what a record says of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pma import conversion
from pma.conversion import ConvertedReader
from pma.formats.contracts import CheckpointReader
from pma.types import TensorSpec


def converted(
    readers: Sequence[CheckpointReader], like: Path, map_name: str | None, exclude: Sequence[str]
) -> list[CheckpointReader]:
    """The readers as checkpoints of the model in `like`, without the source tensors that `exclude` names."""
    given = conversion.load_map(map_name) if map_name is not None else None
    return [*conversion.convert_alike(readers, conversion.read_template(like), given, exclude=exclude)]


def record(reader: CheckpointReader) -> dict[str, Any] | None:
    """How a reader's tensors are converted: map, template, and digests of both. None where they are not."""
    if not isinstance(reader, ConvertedReader):
        return None
    done = reader.conversion
    return {
        "map": done.map.name,
        "map_blake3": done.map.digest,
        "like": str(done.template.path.resolve()),
        "like_blake3": done.template.digest,
    }


def stored_tensors(reader: CheckpointReader) -> Mapping[str, TensorSpec]:
    """What the checkpoint holds, under its own names."""
    return reader.inner.tensors if isinstance(reader, ConvertedReader) else reader.tensors


def left_out(reader: CheckpointReader) -> tuple[str, ...]:
    """Tensors of the checkpoint, under its own names, that the converted model does without."""
    return reader.conversion.unused if isinstance(reader, ConvertedReader) else ()
