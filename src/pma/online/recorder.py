"""The recorder: running averages of a model's weights while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pma.errors import UsageError
from pma.formats.interval_mean import MEAN_FOLDER, METADATA_KEY, RECORD_FILE, IntervalMean, file_of
from pma.online import entries as live
from pma.online.entries import Masters
from pma.online.feeding import DirectFeed, Feed, StagedFeed
from pma.online.keeping import Kept
from pma.online.ranks import as_dtensor, ranks_of, unwrapped
from pma.online.stored_names import AsStored, stored_by
from pma.online.storing import need_folder, write_file, write_shards
from pma.online.sums import Sum, together
from pma.online.swapping import in_order, swapped

if TYPE_CHECKING:
    import torch
    from torch import nn

#: an average: of the interval, of the window, or a track by its width
Which = Literal["interval", "window"] | float


class Recorder:
    """Keeps the mean of a model's weights over each checkpoint interval, in fp32, and stores it beside
    checkpoints.

        recorder = Recorder(model)
        …
            optimizer.step()
            recorder.update(step)
            …
                save_checkpoint(folder)
                recorder.save(folder)

    `every`: steps that are multiples of it are recorded. `on_cpu`: averages lie in the CPU's memory and are
    added there by a thread; else where the weights lie, 4 bytes a parameter. `optimizer`: keeps fp32 masters,
    where it does, and lets copies from a GPU run until its next step. `masters`: fp32 masters by parameter
    name, or a function of name and parameter. `window`: also keep the last so many interval means (or
    "snapshots", the weights when an interval ends). `tracks`: relative widths of power-function averages to
    keep. `as_stored`: from averages by parameter name to how the checkpoint stores them, where neither the
    state dict nor `save_pretrained` tells.

    Under DistributedDataParallel rank 0 records; of FSDP2's DTensors every rank records its shards. Then
    every rank makes a recorder and calls its methods.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        on_cpu: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        masters: Mapping[str, torch.Tensor] | Masters | None = None,
        window: int = 0,
        window_of: Literal["interval means", "snapshots"] = "interval means",
        tracks: Sequence[float] = (),
        as_stored: AsStored | None = None,
    ) -> None:
        if every < 1 or window < 0:
            raise UsageError(f"every={every}, window={window}: expected every ≥ 1 and window ≥ 0")
        if window_of not in ("interval means", "snapshots"):
            raise UsageError(f'window_of={window_of!r}: expected "interval means" or "snapshots"')
        self.every = every
        self._model = unwrapped(model)
        found = live.entries_of(self._model)
        self._entries = sorted(found, key=lambda entry: entry.parameter is None)  # buffers last
        self._ranks = ranks_of(model, self._entries)
        self._recorded = self._entries if self._ranks.records else []
        self._as_stored = as_stored or stored_by(self._model, self._entries)
        self._masters = _masters(masters, optimizer)
        self._on_cpu = on_cpu
        self._feed: Feed = StagedFeed(holds=optimizer is not None) if on_cpu else DirectFeed()
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: self._feed.hold())
        self._kept = Kept(
            self._entries, self._ranks, every=every, window=window, window_of=window_of, sigmas=tracks
        )

    def update(self, step: int) -> None:
        """Record the weights after optimizer step `step`; call it once after each step.

        Raises UsageError where a step is left out or comes again: the mean would not be of each `every`-th
        step.
        """
        last = self._kept.step
        if last is not None and step != last + 1:
            raise UsageError(
                f"update({step}) after update({last}): expected {last + 1}, once after each optimizer step. "
                "After going back to a checkpoint make a new recorder, or load its state"
            )
        self._kept.step = step
        if step % self.every:
            return
        values, averaged = self._values()
        self._give(values, self._kept.record(step, averaged))

    def save(self, checkpoint: Path | str) -> Path | None:
        """End the interval and store its mean beside `checkpoint` (its folder, or its file), which is there
        already.

        Returns where, or None where no step of the interval was a multiple of `every`, and on ranks that
        write nothing. Raises as `store`.
        """
        self.end_interval()
        return self.store(checkpoint)

    def end_interval(self) -> None:
        """The next update begins another interval; this one enters the window, if there is one."""
        if self._kept.takes_snapshots and self._kept.step is not None:
            values, averaged = self._values()
            self._give(values, self._kept.snapshot(averaged))
        else:
            self._feed.wait()
        self._kept.end_interval()

    def store(self, checkpoint: Path | str) -> Path | None:
        """Store the mean of the interval that ended last, for trainers that must know that it ended before
        they save (a state saved before it ended goes on with it). None where it is stored already.

        Raises UsageError unless the checkpoint is there, SpaceError, StorageError; it can be tried again
        then.
        """
        self._feed.wait()
        for entry in self._entries:
            entry.check()
        interval = self._kept.finished
        if interval is None:
            return None
        record = IntervalMean(
            first_step=interval.first_step,
            last_step=interval.last_step,
            updates=interval.updates,
            every=self.every,
            averaged=interval.averaged,
        )
        path = self._write(Path(checkpoint), record, interval)
        self._kept.finished = None
        return path

    def average(self, which: Which | None = None) -> dict[str, torch.Tensor]:
        """An average by parameter name, in fp32: the interval's mean, the window's, or the track of that
        width.

        By default the window's, where one is kept and has something, else the interval's (the last one's,
        right after it ended). Under FSDP2 this process's parts; under DDP rank 0's alone, and empty on
        others. Raises UsageError where nothing was recorded.
        """
        self._feed.wait()
        return self._named(self._kept.mean(which))

    @contextmanager
    def applied(
        self, which: Which | None = None, *, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[None]:
        """Inside the block the model has an average (see `average`, or `tensors` by parameter name) for its
        weights; after it, however it ends, its own again, to the bit. Where there are several processes all
        enter it.
        """
        self._feed.wait()
        self._feed.hold()
        if tensors is None:
            averages, broadcast = self._kept.mean(which), self._ranks.replicated
        else:
            averages, broadcast = in_order(self._entries, tensors), False
        with swapped(self._model, self._entries, averages, broadcast=broadcast):
            yield

    def stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Averages by parameter name as a checkpoint of the model stores them."""
        return self._as_stored(dict(tensors))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs for the same averages, to the bit; for `torch.save`, or as a value of what
        torch.distributed.checkpoint saves and loads (it is `Stateful`). Shares the averages' memory.
        """
        self._feed.wait()
        return self._kept.state_dict(self._on_cpu)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s. Raises MismatchError for another model, number of processes that shards
        are cut over, `every`, window or tracks; FormatError for anything else.
        """
        self._feed.wait()
        self._kept.load_state_dict(state, self._on_cpu, "the recorder's state")

    @property
    def has_recorded(self) -> bool:
        """Whether there is an average already."""
        return self._kept.has_recorded

    @property
    def carries_state(self) -> bool:
        """Whether a resumed run needs more than a new recorder: a window, tracks, part of an interval."""
        return self._kept.carries_state

    def save_state(self, checkpoint: Path | str) -> Path | None:
        """Store the state in the folder `pma_recorder` in a checkpoint's folder; None where a new recorder
        does.
        """
        from pma.online.state_files import save_state

        self._feed.wait()
        return save_state(self._kept, Path(checkpoint)) if self.carries_state else None

    def load_state(self, checkpoint: Path | str) -> bool:
        """Go on from what `save_state` stored; False where nothing is stored. Raises as `load_state_dict`."""
        from pma.online.state_files import load_state

        self._feed.wait()
        return load_state(self._kept, Path(checkpoint), self._on_cpu)

    def _values(self) -> tuple[list[torch.Tensor], str]:
        # every rank tells what is averaged, also one that records nothing
        found = [live.value_of(entry, self._masters) for entry in self._entries]
        return [value for value, _ in found][: len(self._recorded)], together(kind for _, kind in found)

    def _named(self, averages: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {entry.name: average for entry, average in zip(self._recorded, averages, strict=True)}

    def _give(self, values: list[torch.Tensor], use: Any) -> None:
        if not values:
            return
        buffers_from = sum(entry.parameter is not None for entry in self._recorded)
        import torch

        with torch.no_grad():
            self._feed.give(values, buffers_from, use)

    def _write(self, checkpoint: Path, record: IntervalMean, interval: Sum) -> Path | None:
        if self._ranks.sharded:
            need_folder(checkpoint, "the interval's mean")
            means = self._named(mean.to("cpu") for mean in interval.mean())
            parts = {entry.name: as_dtensor(means[entry.name], entry.live) for entry in self._recorded}
            folder = checkpoint / MEAN_FOLDER
            write_shards(parts, folder, (RECORD_FILE, record.to_json()))
            return folder
        if not self._recorded:
            return None
        path = file_of(checkpoint)
        need_folder(path.parent, "the interval's mean")
        means = self._named(mean.to("cpu") for mean in interval.mean())
        write_file(self._as_stored(means), {METADATA_KEY: record.to_json()}, path)
        return path


def _masters(
    given: Mapping[str, torch.Tensor] | Masters | None, optimizer: torch.optim.Optimizer | None
) -> Masters | None:
    if given is None:
        return live.masters_of(optimizer) if optimizer is not None else None
    return live.given_masters(given) if isinstance(given, Mapping) else given
