"""Other averages put together from tracks that were stored beside checkpoints, after the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma.averaging.power_ema import Profile, gamma_from_sigma, power_profile, reconstruct
from pma.errors import FormatError, MismatchError, UsageError, printable
from pma.online.state import decode
from pma.online.state_files import STATE_FOLDER, read_tensors, stored_record
from pma.online.sums import kept_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class StoredTrack:
    """A track as it was at one checkpoint."""

    checkpoint: Path
    sigma: float
    first_step: int
    last_step: int
    every: int
    prefix: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def profile(self) -> Profile:
        """The weight that each step has in it."""
        gamma = gamma_from_sigma(self.sigma)
        return power_profile(gamma, self.last_step, first_step=self.first_step, every=self.every)


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """An average by parameter name, in fp32; the coefficient of each stored track; and how far the weights of
    steps are from those asked for, as a share of their own length.
    """

    tensors: dict[str, torch.Tensor]
    coefficients: tuple[tuple[StoredTrack, float], ...]
    relative_error: float


def stored_tracks(checkpoints: Sequence[Path | str]) -> list[StoredTrack]:
    """The tracks that `Recorder.save_state` left in the folders of checkpoints.

    Raises UsageError for a checkpoint without, FormatError for a damaged record.
    """
    found: list[StoredTrack] = []
    for checkpoint in map(Path, checkpoints):
        where = str(checkpoint / STATE_FOLDER)
        text = stored_record(checkpoint)
        if text is None:
            raise UsageError(f"{checkpoint} holds no {STATE_FOLDER}: record with tracks, and save_state")
        record = decode(text, where)
        try:
            found += _tracks(checkpoint, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{where} is damaged: {printable(repr(error))}") from error
    return found


def reconstructed(
    checkpoints: Sequence[Path | str], target: Profile, *, last_step: int | None = None
) -> Reconstructed:
    """The average with the profile `target` over steps 1 … `last_step` (by default the newest stored) as near
    as the stored tracks come to it; targets are made by `averaging.power_ema`.

    Added in fp64 and rounded once. Raises UsageError, FormatError, MismatchError for tracks of different
    models.
    """
    tracks = [
        track for track in stored_tracks(checkpoints) if last_step is None or track.last_step <= last_step
    ]
    if not tracks:
        raise UsageError("no track is stored at or before that step")
    if any(track.shapes != tracks[0].shapes for track in tracks):
        raise MismatchError("the checkpoints' tracks are of different models")
    fit = reconstruct(
        [track.profile for track in tracks], target, last_step or max(t.last_step for t in tracks)
    )
    import torch

    total: dict[str, Any] = {}
    for track, coefficient in zip(tracks, fit.coefficients, strict=True):
        wanted = {track.prefix + name: shape for name, shape in track.shapes}
        for name, tensor in read_tensors(track.checkpoint, wanted).items():
            product = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
            name = name.removeprefix(track.prefix)
            total[name] = total.get(name, 0) + coefficient * product
    return Reconstructed(
        tensors={name: tensor.to(kept_dtype(tensor)) for name, tensor in total.items()},
        coefficients=tuple(zip(tracks, fit.coefficients, strict=True)),
        relative_error=fit.relative_error,
    )


def _tracks(checkpoint: Path, record: dict[str, Any]) -> list[StoredTrack]:
    setup = record["setup"]
    shapes = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in setup["shapes"])
    spans = [(float(sigma), record["sums"][f"track {json.dumps(sigma)}"]) for sigma in setup["sigmas"]]
    return [
        StoredTrack(
            checkpoint=checkpoint,
            sigma=sigma,
            first_step=int(span["first_step"]),
            last_step=int(span["last_step"]),
            every=int(setup["every"]),
            prefix=f"track_{number}.",
            shapes=shapes,
        )
        for number, (sigma, span) in enumerate(spans)
        if span["last_step"]
    ]
