"""What a recorder keeps: the interval's sum, the window, the tracks; and their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pma.averaging.power_ema import gamma_from_sigma
from pma.errors import FormatError, UsageError, printable
from pma.online.entries import Entry, local_part
from pma.online.feeding import Use
from pma.online.ranks import Ranks, as_dtensor
from pma.online.state import Setup, decode, encode
from pma.online.sums import Sum, kept_dtype
from pma.online.tracks import Track
from pma.online.window import SlidingWindow

if TYPE_CHECKING:
    import torch


class Kept:
    """Averages of a model's entries. `step` is the newest that training told of."""

    def __init__(
        self,
        entries: Sequence[Entry],
        ranks: Ranks,
        *,
        every: int,
        window: int,
        window_of: str,
        sigmas: Sequence[float],
    ) -> None:
        for sigma in sigmas:
            gamma_from_sigma(sigma)
        self.ranks = ranks
        self.entries = entries if ranks.records else ()
        self.step: int | None = None
        self.interval = Sum()
        self.finished: Sum | None = None  # the interval that ended last, until it is stored or another begins
        self.window = SlidingWindow(window) if window else None
        self.takes_snapshots = window > 0 and window_of == "snapshots"
        self.tracks = [Track(sigma=sigma) for sigma in sigmas]
        self.setup = Setup(
            every=every,
            window_last=window,
            window_of=window_of,
            sigmas=tuple(sigmas),
            shards=ranks.count if ranks.sharded else 1,
            shapes=tuple((entry.name, tuple(entry.live.shape)) for entry in entries),
        )

    def record(self, step: int, averaged: str) -> Use:
        """Take note of a recorded step; what is to be done with its values."""
        self.finished = None
        interval, first = self.interval, self.interval.count(step, averaged)
        shares = [(track, track.advance(step)) for track in self.tracks]

        def use(values: Sequence[torch.Tensor]) -> None:
            interval.add(values, first=first)
            for track, kept in shares:
                track.add(values, kept)

        return use

    def snapshot(self, averaged: str) -> Use:
        """Push the weights of now into the window; what is to be done with their values."""
        assert self.window is not None
        assert self.step is not None
        newest = self.window.next_sum()
        first = newest.count(self.step, averaged)
        self.window.push(newest)
        return lambda values: newest.add(values, first=first)

    def end_interval(self) -> None:
        """The next record begins another interval; this one enters the window of means."""
        if self.interval.ended or not self.interval.updates:
            return
        self.finished = self.interval
        if self.window is None or self.takes_snapshots:
            self.interval.ended = True
        else:
            following = self.window.next_sum()
            self.window.push(self.interval)
            self.interval = following

    def mean(self, which: str | float | None) -> Iterator[torch.Tensor]:
        """See `Recorder.average`; one new tensor at a time, so that a device need not hold them all."""
        if which is None:
            which = "window" if self.window is not None and self.window.updates else "interval"
        if which == "interval":
            newest = self.interval
            if (
                not newest.updates
                and self.window is not None
                and not self.takes_snapshots
                and self.window.sums
            ):
                newest = self.window.sums[-1]
            _recorded(newest.updates, "the interval")
            return newest.mean()
        if which == "window":
            if self.window is None:
                raise UsageError("no window is kept; make the recorder with window=N")
            _recorded(self.window.updates, "the window")
            return self.window.mean()
        for track in self.tracks:
            if track.sigma == which:
                _recorded(track.last_step, f"track {which:g}")
                return (tensor.clone() for tensor in track.tensors)
        have = ", ".join(f"{track.sigma:g}" for track in self.tracks) or "none"
        raise UsageError(f"no average {which!r}; there are interval, window, and tracks of widths: {have}")

    @property
    def has_recorded(self) -> bool:
        """Whether the interval or the window has a mean."""
        return bool(self.interval.updates or (self.window is not None and self.window.updates))

    @property
    def carries_state(self) -> bool:
        """Whether a new recorder could not stand in for this one."""
        return bool(self.tracks) or self.window is not None or bool(self._open.updates)

    @property
    def _open(self) -> Sum:
        """The interval under way; an empty sum where it has ended."""
        return Sum(tensors=self.interval.tensors) if self.interval.ended else self.interval

    def encoded(self) -> str:
        """The record of the state, as JSON."""
        named: dict[str, Any] = {"interval": _counts(self._open)}
        for track in self.tracks:
            named[f"track {track.sigma!r}"] = {"first_step": track.first_step, "last_step": track.last_step}
        window = [_counts(entry) for entry in self.window.sums] if self.window else []
        return encode(self.setup, self.step, named, window)

    def groups(self) -> Iterator[tuple[str, list[torch.Tensor], bool]]:
        """Each group of tensors in the state, what their names begin with, whether it has values."""
        yield "interval.", self.interval.tensors, bool(self._open.updates)
        for number, track in enumerate(self.tracks):
            yield f"track_{number}.", track.tensors, bool(track.last_step)
        sums = list(self.window.sums) if self.window else []
        for number in range(self.setup.window_last):
            filled = number < len(sums)
            yield f"window_{number}.", sums[number].tensors if filled else [], filled

    def state_dict(self, on_cpu: bool) -> dict[str, Any]:
        """The record, and tensors by name; the same names whatever was recorded, so that it can be loaded
        into.
        """
        tensors: dict[str, Any] = {}
        for prefix, group, _ in self.groups():
            # before anything was recorded there is nothing but room to load into
            for entry, part in zip(self.entries, group or self._zeros(on_cpu), strict=True):
                tensors[prefix + entry.name] = as_dtensor(part, entry.live)
        return {"record": self.encoded(), "tensors": tensors}

    def check_record(self, text: object, where: str) -> None:
        """Raises FormatError or MismatchError unless a state with this record can be gone on from."""
        try:
            self.setup.check(decode(text, where)["setup"], where)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{where} is damaged: {printable(repr(error))}") from error

    def load_state_dict(self, state: Mapping[str, Any], on_cpu: bool, where: str) -> None:
        """Take over a state; nothing is changed where it does not fit."""
        self.check_record(state.get("record"), where)
        record = decode(state.get("record"), where)
        tensors = state.get("tensors")
        if not isinstance(tensors, Mapping):
            raise FormatError(f"{where}: its tensors are missing")
        try:
            interval = _sum(record["sums"]["interval"])
            spans = [record["sums"][f"track {track.sigma!r}"] for track in self.tracks]
            tracks = [
                Track(sigma=t.sigma, first_step=int(s["first_step"]), last_step=int(s["last_step"]))
                for t, s in zip(self.tracks, spans, strict=True)
            ]
            window = [_sum(counts) for counts in record["window"]]
            step = None if record["step"] is None else int(record["step"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{where} is damaged: {printable(repr(error))}") from error
        if interval.updates:
            interval.tensors = self._taken(tensors, "interval.", on_cpu, where)
        for number, track in enumerate(tracks):
            if track.last_step:
                track.tensors = self._taken(tensors, f"track_{number}.", on_cpu, where)
        for number, entry in enumerate(window):
            entry.tensors = self._taken(tensors, f"window_{number}.", on_cpu, where)
        self.step, self.interval, self.tracks = step, interval, tracks
        if self.window is not None:
            self.window.sums.clear()
            self.window.sums.extend(window)

    def _taken(
        self, tensors: Mapping[str, torch.Tensor], prefix: str, on_cpu: bool, where: str
    ) -> list[torch.Tensor]:
        taken = []
        for entry, place in zip(self.entries, self._zeros(on_cpu), strict=True):
            found = tensors.get(prefix + entry.name)
            part = None if found is None else local_part(found)
            if part is None or part.shape != place.shape or part.dtype != place.dtype:
                what = "missing" if part is None else f"{part.dtype} {tuple(part.shape)}"
                raise FormatError(
                    f"{where}: {printable(prefix + entry.name)} is {what}, expected {place.dtype} "
                    f"{tuple(place.shape)}"
                )
            taken.append(place.copy_(part))
        return taken

    def _zeros(self, on_cpu: bool) -> list[torch.Tensor]:
        import torch

        locals_ = [entry.local for entry in self.entries]
        return [
            torch.zeros(v.shape, dtype=kept_dtype(v), device="cpu" if on_cpu else v.device) for v in locals_
        ]


def _counts(entry: Sum) -> dict[str, Any]:
    names = ("first_step", "last_step", "updates", "averaged")
    return {name: getattr(entry, name) for name in names}


def _sum(counts: Mapping[str, Any]) -> Sum:
    first, last, updates = (int(counts[name]) for name in ("first_step", "last_step", "updates"))
    return Sum(first_step=first, last_step=last, updates=updates, averaged=str(counts["averaged"]))


def _recorded(updates: int, what: str) -> None:
    if not updates:
        raise UsageError(f"{what} has no recorded step yet")
