"""How a step's values reach what averages them: at once where they are, or through a copy that a thread adds.

Either way the same additions are made in the same order, so the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: what takes a step's values, in the order of the entries
Use = Callable[[Sequence["torch.Tensor"]], None]


class Feed(Protocol):
    """Hands values on. They may change as soon as `give` (and for a GPU, `hold`) has returned."""

    def give(self, values: Sequence[torch.Tensor], buffers_from: int, use: Use) -> None:
        """Have `use` called with the values as they are now; from `buffers_from` on they are buffers, which
        change in any pass, not only in the optimizer's step.
        """

    def hold(self) -> None:
        """Called before the optimizer's step: what is still being copied must not change before."""

    def wait(self) -> None:
        """Return when every `use` has. Raises what one of them raised."""


class DirectFeed:
    """On the device where the values lie, before `give` returns (on a GPU: before anything queued later)."""

    def give(self, values: Sequence[torch.Tensor], buffers_from: int, use: Use) -> None:
        use(values)

    def hold(self) -> None:
        pass

    def wait(self) -> None:
        pass


class StagedFeed:
    """On the CPU, by a thread, while training goes on.

    From a CPU, values are copied before `give` returns. From a GPU they go to pinned memory on a stream of
    their own, beside the next forward and backward pass, which change no parameter; `holds` says that `hold`
    is called before the optimizer's step. Else the current stream waits at once.
    """

    def __init__(self, *, holds: bool) -> None:
        self._holds = holds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pma-recorder")
        self._adding: Future[None] | None = None
        self._staging: list[torch.Tensor] = []
        self._stream: Any = None
        self._copied: Any = None

    def give(self, values: Sequence[torch.Tensor], buffers_from: int, use: Use) -> None:
        self.wait()  # one staging area: the last step's values were added before these come
        self._make_room(values)
        copied = self._copy(values, buffers_from)
        staging = self._staging

        def add() -> None:
            if copied is not None:
                copied.synchronize()
            use(staging)

        self._adding = self._thread.submit(add)

    def hold(self) -> None:
        if self._copied is not None:
            import torch

            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def wait(self) -> None:
        adding, self._adding = self._adding, None
        if adding is not None:
            adding.result()

    def _make_room(self, values: Sequence[torch.Tensor]) -> None:
        import torch

        same = len(self._staging) == len(values) and all(
            room.dtype == value.dtype and room.shape == value.shape
            for room, value in zip(self._staging, values, strict=True)
        )
        if same:
            return
        on_gpu = any(value.is_cuda for value in values)
        self._staging = [torch.empty(v.shape, dtype=v.dtype, pin_memory=on_gpu) for v in values]
        self._stream = torch.cuda.Stream() if on_gpu else None

    def _copy(self, values: Sequence[torch.Tensor], buffers_from: int) -> Any:
        """Copy into the staging area; an event that tells when a GPU has done so."""
        import torch

        if self._stream is None:
            for room, value in zip(self._staging, values, strict=True):
                room.copy_(value)
            return None
        for room, value in zip(self._staging[buffers_from:], values[buffers_from:], strict=True):
            room.copy_(value, non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for room, value in zip(self._staging[:buffers_from], values[:buffers_from], strict=True):
                room.copy_(value, non_blocking=True)
            self._copied = self._stream.record_event()
        copied = self._copied
        if not self._holds:
            self.hold()
        return copied
