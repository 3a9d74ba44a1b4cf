"""What readers of files have in common: a subclass says which tensors there are and where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from pma.formats import side_files
from pma.formats.contracts import ReadRequest
from pma.formats.files import coalesced
from pma.formats.folder import Folder
from pma.formats.runs import Runs, runs_of
from pma.types import Box, FileIdentity, Fragment, TensorSpec

_LARGEST_SMALL_BYTES = 2**20


class FileReader:
    """Reads tensors from files of one folder by position. Implements `CheckpointReader`.

    `header_digests`: for each file of the checkpoint a digest of what says where its tensors lie.
    """

    format = ""
    request_bytes = 2**19
    requests_in_flight = 4
    ignored_files: tuple[str, ...] = ()

    def __init__(self, path: Path, folder: Folder, header_digests: Mapping[str, str]) -> None:
        self.path = path
        self.folder = folder
        self._header_digests = dict(header_digests)
        folder.close()  # the headers are read; over many checkpoints, what is open adds up

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        raise NotImplementedError("a subclass tells")

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        """How tensor `name` lies on disk: fragments that cover each of its elements exactly once."""
        raise NotImplementedError("a subclass tells")

    @property
    def is_remote(self) -> bool:
        return self.folder.is_remote

    @property
    def forget_after_reading(self) -> bool:
        return self.folder.forget_after_reading

    @forget_after_reading.setter
    def forget_after_reading(self, forget: bool) -> None:
        self.folder.forget_after_reading = forget

    @cached_property
    def layout_digest(self) -> str:
        files = [f"{name} {digest}" for name, digest in self._header_digests.items()]
        return blake3("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()

    def runs(self, name: str, start: int, stop: int, box: Box | None = None) -> Runs:
        return runs_of(self.tensors[name], self.fragments(name), start, stop, box)

    def read_many(self, requests: Sequence[ReadRequest]) -> None:
        self.folder.read_many(coalesced(requests))

    def descriptor(
        self, file: str, offset_bytes: int, length_bytes: int
    ) -> AbstractContextManager[int] | None:
        return self.folder.descriptor(file, offset_bytes, length_bytes)

    def side_files(self) -> Mapping[str, bytes]:
        return side_files.read(self.path)

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        return ()

    def identities(self) -> tuple[FileIdentity, ...]:
        self.folder.refresh()
        found = []
        for name, digest in self._header_digests.items():
            size_bytes, stamp = self.folder.status(name)
            found.append(FileIdentity(name=name, size_bytes=size_bytes, mtime_ns=stamp, header_digest=digest))
        return tuple(found)

    def also(self, name: str) -> None:
        """A small file that is part of the checkpoint too; its digest is of all of its bytes."""
        self._header_digests[name] = blake3(self.folder.read_whole(name, _LARGEST_SMALL_BYTES)).hexdigest()

    def close(self) -> None:
        self.folder.close()
