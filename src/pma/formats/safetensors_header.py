"""The header of a safetensors file: parsed strictly, because a checkpoint is untrusted input; and written.

Layout: 8 bytes little-endian header length, a JSON object (name -> dtype, shape, data_offsets; optional
`__metadata__`), then the tensors' bytes with no hole between them. Source: safetensors 0.8, format
specification.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from blake3 import blake3

from pma.errors import FormatError, IncompleteError, printable
from pma.formats.folder import Folder
from pma.formats.strict_json import parse_object, refuse_above
from pma.types import DType, TensorSpec

# the library itself allows 100 MB; a header of 10,000 tensors has about one
LARGEST_HEADER_BYTES = 16 * 2**20
# about 50,000 tensors in one file
_HEADER_BUDGET_BYTES = 60 * 2**20
_DTYPES = {dtype.value[0]: dtype for dtype in DType}
_FIRST_READ_BYTES = 2**15
# the shards of a run's checkpoints have the same headers: each is parsed, checked and held once
_parsed: WeakValueDictionary[tuple[str, int], Header] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class Header:
    """A parsed header: tensors in order of their bytes, each with its offset in the file."""

    tensors: Mapping[str, TensorSpec]
    offsets_bytes: Mapping[str, int]
    metadata: Mapping[str, str]
    file_bytes: int
    digest: str


def read_header(folder: Folder, name: str) -> Header:
    """Parse and check the header of a file; reads nothing else. Raises FormatError or IncompleteError."""
    path = folder.path / name
    file_bytes = folder.size_bytes(name)
    if file_bytes < 8:
        raise IncompleteError(
            f"{path} has {file_bytes} bytes; a safetensors file has at least 8. It was cut short"
        )
    # the length field, and more in the same request: a remote store takes long to answer
    first = memoryview(bytearray(min(_FIRST_READ_BYTES, file_bytes)))
    folder.read(name, 0, [first])
    header_bytes = int.from_bytes(first[:8], "little")
    if header_bytes > LARGEST_HEADER_BYTES:
        raise FormatError(
            f"{path}: a header of {header_bytes} bytes is announced, at most {LARGEST_HEADER_BYTES} is "
            "read; "
            "this is no safetensors file, or a damaged one"
        )
    if 8 + header_bytes > file_bytes:
        raise IncompleteError(
            f"{path}: the header should end at byte {8 + header_bytes}, the file at {file_bytes}. It was "
            "cut short"
        )
    there = min(header_bytes, len(first) - 8)
    text = bytearray(header_bytes)
    text[:there] = first[8 : 8 + there]
    folder.read(name, len(first), [memoryview(text)[there:]])
    digest = blake3(text).hexdigest()
    header = _parsed.get((digest, file_bytes))
    if header is None:
        header = _parsed[digest, file_bytes] = _checked(path, text, file_bytes, digest)
    return header


def _checked(path: Path, text: bytearray, file_bytes: int, digest: str) -> Header:
    if not text.startswith(b"{"):
        raise FormatError(f"{path}: the header does not start with '{{'; this is no safetensors file")
    where = f"{path}: the header"
    refuse_above(_HEADER_BUDGET_BYTES, text, where)
    entries = parse_object(text, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map names to strings")
    spans = [(*_entry(path, name, entry), name) for name, entry in entries.items()]
    spans.sort(key=lambda span: (span[1], span[2]))
    data_start = 8 + len(text)
    position = 0
    for spec, start, stop, _ in spans:
        if start != position:
            kind = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise FormatError(
                f"{path}: {printable(spec.name)} {kind}: it starts at byte {start} of the data, expected "
                f"{position}"
            )
        position = stop
    expected_bytes = data_start + position
    if file_bytes < expected_bytes:
        raise IncompleteError(
            f"{path} has {file_bytes} bytes, its header promises {expected_bytes}. It was cut short"
        )
    if file_bytes > expected_bytes:
        raise FormatError(
            f"{path} has {file_bytes - expected_bytes} bytes that no tensor owns after the last tensor"
        )
    return Header(
        tensors={name: spec for spec, _, _, name in spans},
        offsets_bytes={name: data_start + start for _, start, _, name in spans},
        metadata=metadata,
        file_bytes=file_bytes,
        digest=digest,
    )


def _entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    where = f"{path}: {printable(name)}"
    if not _encodable(name):
        raise FormatError(f"{where}: the name is not valid UTF-8")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(
            f"{where}: dtype {printable(str(entry['dtype']))} is not in the safetensors specification"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > 64 or math.prod(shape) >= 2**63:
        raise FormatError(f"{where}: shape {printable(str(shape))} is not a list of non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets {printable(str(offsets))} are not a start and an end")
    bits = math.prod(shape) * dtype.bits
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise FormatError(
            f"{where}: {dtype.value[0]} of shape {printable(str(tuple(shape)))} takes {bits / 8:g} bytes, "
            f"its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape)), offsets[0], offsets[1]


def _encodable(name: str) -> bool:
    # JSON can spell half of a surrogate pair, which no file can then hold
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _naturals(value: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python; 2**63 bounds what any file system can hold
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def encode_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length field and header for `tensors` stored one after the other, padded so that the data are 8-byte
    aligned. Raises FormatError for a name that other formats can hold and this one cannot.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in tensors:
        if not _encodable(spec.name) or spec.name == "__metadata__":
            raise FormatError(
                f"a safetensors file has no place for the name {printable(spec.name)!r}; leave it out with "
                "--exclude"
            )
        stop = position + spec.length_bytes
        entries[spec.name] = {
            "dtype": spec.dtype.value[0],
            "shape": list(spec.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
