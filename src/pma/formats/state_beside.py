"""Weights together with what a trainer keeps in other files of the same folder in order to go on: archives
of the optimizer, read tensor by tensor, and small files that are carried unopened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from blake3 import blake3

from pma.errors import FormatError, printable
from pma.formats import hf_trainer
from pma.formats.folder import open_folder
from pma.formats.optimizer_kinds import STEP
from pma.formats.reader import FileReader
from pma.formats.torch_archive import StoredTensor, read_archive
from pma.formats.torch_contents import counts_of_steps, kept, spec_of, tensors_in
from pma.formats.torch_writing import archive_layout
from pma.types import Fragment, Layout, OutputFile, TensorSpec

#: the optimizer's files of the transformers Trainer and of accelerate, and what else they need, last what
#: completes the Trainer's checkpoint
_OPTIMIZERS = ("optimizer.pt", "optimizer*.bin")
_OTHERS = (
    "scheduler.pt",
    "scheduler*.bin",
    "sampler*.bin",
    "dl_state_dict*.bin",
    "scaler.pt",
    "rng_state*.pth",
    "random_states_*.pkl",
    "custom_checkpoint_*.pkl",
    "training_args.bin",
    hf_trainer.STATE_FILE,
)
_LARGEST_BYTES = 256 * 2**20


class WithState(FileReader):
    """A reader's tensors and those of `archives`, named by what the archive is called and the way from its
    top, such as `optimizer.pt/state/0/exp_avg`. Implements `CheckpointReader`.

    `archives`: the file of each, by what it is called in every checkpoint of the run. `copied`: names of
    small files that an output gets as they are, in this order.
    """

    def __init__(self, weights: FileReader, archives: Mapping[str, str], copied: Sequence[str] = ()) -> None:
        self.weights, self.copied = weights, tuple(copied)
        self.format = weights.format
        taken = {*archives.values(), *copied}
        self.ignored_files = tuple(name for name in weights.ignored_files if name not in taken)
        self.files, self.values = dict(archives), dict[str, Any]()
        self._stored: dict[str, StoredTensor] = {}
        digests = {identity.name: identity.header_digest for identity in weights.identities()}
        with closing(open_folder(weights.folder.path)) as folder:
            for called, file in archives.items():
                archive = read_archive(folder, file)
                digests[file], self.values[called] = archive.digest, archive.value
                self._take(called, str(folder.path / file))
        super().__init__(weights.path, weights.folder, digests)

    def _take(self, called: str, where: str) -> None:
        for name, tensor in tensors_in(self.values[called], called, where, 0):
            if not tensor.contiguous:
                raise FormatError(
                    f"{where}: the elements of {printable(name)} do not lie one after the other; save the "
                    "optimizer's state with contiguous tensors"
                )
            self._stored[name] = tensor

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {**self.weights.tensors, **{name: spec_of(name, t) for name, t in self._stored.items()}}

    def fragments(self, name: str) -> tuple[Fragment, ...]:
        if name not in self._stored:
            return self.weights.fragments(name)
        stored = self._stored[name]
        return (Fragment.whole(self.tensors[name], stored.file, stored.offset_bytes),)

    @cached_property
    def layout_digest(self) -> str:
        # not of the pickles: they also hold rates and the like
        rows = [
            f"{t.file} {t.offset_bytes} {t.dtype.name} {t.shape} {name!r}" for name, t in self._stored.items()
        ]
        text = "\n".join([self.weights.layout_digest, *rows])
        return blake3(text.encode("utf-8", "surrogatepass")).hexdigest()

    def side_files(self) -> Mapping[str, bytes]:
        return self.weights.side_files()

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        return self.weights.left_out(self.of_weights(tensors))

    def close(self) -> None:
        self.weights.close()
        super().close()

    def of_weights(self, tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Those of `tensors` that are in the weights' own files."""
        return {name: spec for name, spec in tensors.items() if name not in self._stored}

    def completed(
        self, layout: Layout, tensors: Mapping[str, TensorSpec], *, fresh_steps: bool = False
    ) -> Layout:
        """The weights' layout with the archives and the small files beside them. `fresh_steps`: counts of
        steps that are plain numbers are zero.
        """
        files = [self._planned(called, tensors, fresh_steps=fresh_steps) for called in self.files]
        copied = {name: self.folder.read_whole(name, _LARGEST_BYTES) for name in self.copied}
        return Layout(
            tensors=dict(tensors), files=(*layout.files, *files), records={**layout.records, **copied}
        )

    def _planned(self, called: str, tensors: Mapping[str, TensorSpec], *, fresh_steps: bool) -> OutputFile:
        copy, file = kept(self.values[called], called, tensors), self.files[called]
        if copy is None:
            raise FormatError(
                f"{self.folder.path / file} holds what cannot be written again as it is, or a tensor that is "
                "excluded"
            )
        for kept_for, _ in counts_of_steps(copy) if fresh_steps else ():
            kept_for[STEP] = type(kept_for[STEP])(0)
        return archive_layout(file, copy)


def with_trainer_state(weights: FileReader) -> FileReader:
    """`weights` with what the Trainer or accelerate saved beside, where it saved an optimizer."""
    names = weights.folder.names() if weights.path.is_dir() else []
    archives = _matching(names, _OPTIMIZERS)
    if not archives:
        return weights
    return WithState(weights, dict(zip(archives, archives, strict=True)), _matching(names, _OTHERS))


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for pattern in patterns for name in names if fnmatchcase(name, pattern)]
