"""Scalars of TensorBoard's event files: records framed as TFRecord says, events parsed by TensorBoard's own
protocol.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pma.errors import FormatError, MissingExtra, UsageError
from pma.logs.rows import LARGEST_LOG_BYTES, Notes

NAME = "events.out.tfevents."
# an event of scalars has tens of bytes; larger ones are histograms, pictures and texts
_LARGEST_EVENT_BYTES = 64 * 2**10
_HEADER = struct.Struct("<QI")  # length, masked CRC of it
_CHECKSUM = struct.Struct("<I")
# element types of tensors, by their numbers in the protocol: DT_FLOAT, DT_DOUBLE
_PACKED = {1: struct.Struct("<f"), 2: struct.Struct("<d")}


def event_rows(paths: Sequence[Path], notes: Notes) -> Iterator[dict[str, Any]]:
    """One row a scalar, files in the order they were begun in; a trainer begins one at each start.

    A file whose end is cut or damaged is read up to there. Raises MissingExtra without TensorBoard.
    """
    if not all(isinstance(path, type(Path())) for path in paths):
        raise UsageError("TensorBoard's files are read from local folders only; copy them first")
    for path in sorted(paths, key=lambda p: (_begun(p), p.name)):
        size_bytes = path.stat().st_size
        if size_bytes > LARGEST_LOG_BYTES:
            raise FormatError(
                f"{path} has {size_bytes} bytes; more than {LARGEST_LOG_BYTES} is not read. Name another log"
            )
        for event in _events(path, notes):
            for value in event.summary.value if event.HasField("summary") else ():
                number = _scalar(value)
                if number is not None:
                    yield {"step": event.step, value.tag: number}


def _begun(path: Path) -> float:
    """When the file's first event was written; infinity for a file without a whole event."""
    first = next(_events(path, []), None)
    return first.wall_time if first is not None and math.isfinite(first.wall_time) else math.inf


def _events(path: Path, notes: Notes) -> Iterator[Any]:
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as error:
        raise MissingExtra("reading TensorBoard's event files", "train", "tensorboard") from error
    with path.open("rb") as file:
        try:
            for record in _records(file, path.stat().st_size):
                yield Event.FromString(record)
        except (_Damaged, DecodeError):
            notes.append(f"{path.name} is cut short or damaged at its end; it was read up to there")


class _Damaged(Exception):
    """A record is cut short or its checksum is wrong; where the next begins is not known."""


def _records(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    while header := file.read(_HEADER.size):
        if len(header) < _HEADER.size:
            raise _Damaged
        length_bytes, checksum = _HEADER.unpack(header)
        if checksum != masked_crc32c(header[:8]):
            raise _Damaged
        if length_bytes + _CHECKSUM.size > size_bytes - file.tell():
            raise _Damaged
        if length_bytes > _LARGEST_EVENT_BYTES:
            file.seek(length_bytes + _CHECKSUM.size, 1)
            continue
        record = file.read(length_bytes)
        trailer = file.read(_CHECKSUM.size)
        if len(trailer) < _CHECKSUM.size or _CHECKSUM.unpack(trailer)[0] != masked_crc32c(record):
            raise _Damaged
        yield record


def _scalar(value: Any) -> float | None:
    """The number in a summary's value, whether written the old way or as a tensor of one number."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor":
        return None
    tensor = value.tensor
    for values in (tensor.float_val, tensor.double_val):
        if len(values) == 1:
            return float(values[0])
    packed = _PACKED.get(tensor.dtype)
    if packed is None or len(tensor.tensor_content) != packed.size:
        return None
    return float(packed.unpack(tensor.tensor_content)[0])
