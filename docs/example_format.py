"""A format of one's own, whole: `ckpt-100/NAME.npy`, and `DONE`, written last, which lists the names."""

import io
import re
from pathlib import Path

import numpy as np
from blake3 import blake3

from pma.errors import FormatError, printable
from pma.formats.folder import open_folder
from pma.formats.reader import FileReader
from pma.types import CheckpointMeta, DType, Fragment, Layout, OutputFile, TensorSpec

FORMAT = "npy"
CHECKPOINT_NAME = re.compile(r"ckpt-(?P<step>\d{1,18})", re.ASCII)
TYPES = {"<f8": DType.F64, "<f4": DType.F32, "<f2": DType.F16, "<i8": DType.I64, "|b1": DType.BOOL}


def detect(path: Path) -> bool:
    return path.is_dir() and ((path / "DONE").is_file() or any(path.glob("*.npy")))


def read_meta(path: Path) -> CheckpointMeta:
    name = CHECKPOINT_NAME.fullmatch(path.name)
    reason = None if (path / "DONE").is_file() else "DONE is not there yet, and it is written last"
    return CheckpointMeta(step=int(name["step"]) if name else None, incomplete=reason)


class NpyReader(FileReader):  # says where tensors lie; the base class moves their bytes
    format = FORMAT

    def __init__(self, path: Path) -> None:
        folder = open_folder(path)
        self._specs, self._places, digests = {}, {}, {}
        for name in folder.read_whole("DONE", 2**24).decode().split():
            file = Path(name).name + ".npy"  # no name leads out of the folder
            head = bytearray(min(1024, folder.size_bytes(file)))
            folder.read(file, 0, [memoryview(head)])
            spec, start = parsed(path / file, bytes(head), folder.size_bytes(file))
            self._specs[spec.name], self._places[spec.name] = spec, Fragment.whole(spec, file, start)
            digests[file] = blake3(head[:start]).hexdigest()
        super().__init__(path, folder, digests)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return self._specs

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        return (self._places[name],)


open_reader = NpyReader


def parsed(path: Path, head: bytes, file_bytes: int) -> tuple[TensorSpec, int]:
    stream = io.BytesIO(head)
    try:
        np.lib.format.read_magic(stream)
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
        spec = TensorSpec(name=path.stem, dtype=TYPES[dtype.str], shape=shape)
    except (ValueError, KeyError) as error:
        raise FormatError(f"{path} is no array of a type we know: {printable(str(error))}") from error
    if by_column or file_bytes != stream.tell() + spec.length_bytes:
        raise FormatError(f"{path} is not stored row by row, or was cut short")
    return spec, stream.tell()


def plan_layout(tensors: dict[str, TensorSpec], like: FileReader | None) -> Layout:
    codes = {dtype: code for code, dtype in TYPES.items()}
    files = []
    for name, spec in tensors.items():
        header = io.BytesIO()
        described = {"descr": codes[spec.dtype], "fortran_order": False, "shape": spec.shape}
        np.lib.format.write_array_header_1_0(header, described)
        head = header.getvalue()
        place, size = Fragment.whole(spec, f"{name}.npy", len(head)), len(head) + spec.length_bytes
        files.append(OutputFile(name=place.file, size_bytes=size, constants=((0, head),), fragments=(place,)))
    return Layout(tensors=tensors, files=tuple(files), records={"DONE": "\n".join(tensors).encode()})
