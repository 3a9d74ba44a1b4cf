"""Where the elements lie inside stored items: each item of a distributed checkpoint is a file of its own
format.

torch.save's archives keep a tensor's bytes in one piece, but where it begins depends on the version that
wrote it and on the tensor's strides. One item of each kind is parsed; the others of that kind must begin
with the same bytes, except for a checksum. A few hundred bytes are read of each.
"""

# C chunks of a tensor, D dimensions

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.errors import FormatError, printable
from pma.formats.dcp_metadata import ChunkedTensor
from pma.formats.folder import Folder
from pma.formats.torch_archive import StoredTensor, read_archive
from pma.types import DType

Integers = NDArray[np.int64]
_MEMBER = b"PK\x03\x04"  # begins each member of a zip file; its checksum is 14 bytes further
_CHECKSUM = slice(14, 18)
Kind = tuple[DType, tuple[int, ...], int]  # element type, sizes, length in bytes


@dataclass(frozen=True)
class _Form:
    """How items of one kind begin, and where among these bytes the checksum of the data lies."""

    begin: bytes
    checksum: slice

    def fits(self, begin: bytearray) -> bool:
        begin[self.checksum] = bytes(4)
        return begin == self.begin


class Items:
    """The stored items of one folder: finds each one's data, asked for once."""

    def __init__(self, folder: Folder, files: tuple[str, ...]) -> None:
        self._folder, self._files = folder, files
        self._forms: dict[Kind, _Form] = {}

    def data_offsets(self, name: str, tensor: ChunkedTensor) -> Integers:
        """Byte offset, in its file, of each chunk's first element. Raises FormatError where an item is not
        what the metadata say.
        """
        offsets_C = np.empty(len(tensor.file_C), np.int64)
        columns = (tensor.sizes_CD, tensor.file_C, tensor.offset_C, tensor.length_C)
        for chunk, (sizes, file, offset, length) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            kind = (tensor.dtype, tuple(sizes), length)
            offsets_C[chunk] = offset + self._data_offset(name, kind, self._files[file], offset)
        return offsets_C

    def _data_offset(self, name: str, kind: Kind, file: str, offset_bytes: int) -> int:
        form = self._forms.get(kind)
        if form is not None:
            begin = bytearray(len(form.begin))
            self._folder.read(file, offset_bytes, [memoryview(begin)])
            if form.fits(begin):
                return len(begin)
        # the first of its kind, or from another version of torch than the one before
        self._forms[kind] = form = self._parsed(name, kind, file, offset_bytes)
        return len(form.begin)

    def _parsed(self, name: str, kind: Kind, file: str, offset_bytes: int) -> _Form:
        dtype, sizes, length_bytes = kind
        where = f"{self._folder.path / file}: {printable(name)}"
        value = read_archive(self._folder, file, offset_bytes, length_bytes).value
        if not isinstance(value, StoredTensor):
            raise FormatError(f"{where} should be a tensor, found a {type(value).__name__}")
        if value.dtype is not dtype or tuple(value.shape) != sizes:
            raise FormatError(
                f"{where}: stored as {value.dtype.value[0]} {tuple(value.shape)}, "
                f"expected {dtype.value[0]} {sizes}"
            )
        if not value.contiguous:
            raise FormatError(f"{where} is stored with strides {value.stride}; save a contiguous copy of it")
        begin = bytearray(value.offset_bytes - offset_bytes)
        self._folder.read(file, offset_bytes, [memoryview(begin)])
        member = begin.rfind(_MEMBER)
        checksum = slice(member + _CHECKSUM.start, member + _CHECKSUM.stop)
        begin[checksum] = bytes(4)
        return _Form(bytes(begin), checksum)
