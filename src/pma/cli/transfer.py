"""Progress of what moves bytes: how much, how fast, how long still; lines for people or events for
machines.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pma.cli.output import note, progress, say
from pma.engine import Crew, Merge, Roofline
from pma.quantities import bytes_text

_EVENT_SECONDS = 1.0
_LINE_SECONDS = 10.0


@contextmanager
def transfer(
    title: str, bytes_to_write: int, *, as_json: bool, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Call it with bytes read and written since the last call, from any thread. Bytes that were there already
    come with none read.

    A bar where stderr is a terminal, else a line now and then; with `as_json` one JSON object a second; with
    `quiet` nothing.
    """
    if quiet:
        yield lambda read, written: None
        return
    meter, lock = _Meter(bytes_to_write), threading.Lock()
    if as_json:
        last = [time.monotonic()]

        def event(read: int, written: int) -> None:
            with lock:
                state, now = meter.add(read, written), time.monotonic()
                if now - last[0] >= _EVENT_SECONDS or state["bytes_written"] >= bytes_to_write:
                    last[0] = now
                    note(json.dumps({"event": title, **state}))

        yield event
        return
    with progress(title, bytes_to_write) as show:

        def bar(read: int, written: int) -> None:
            with lock:
                state = meter.add(read, written)
                show(state["bytes_written"], _words(state))

        yield bar


def sending(*, as_json: bool) -> Callable[[int, int], None]:
    """Call it with how many bytes of how many have arrived in a store: a line, or an event, now and then."""
    last = [time.monotonic()]

    def tell(sent: int, total: int) -> None:
        now = time.monotonic()
        if now - last[0] >= (_EVENT_SECONDS if as_json else _LINE_SECONDS):
            last[0] = now
            event = {"event": "sending", "bytes_sent": sent, "bytes_to_send": total}
            note(json.dumps(event) if as_json else f"sent {bytes_text(sent)} of {bytes_text(total)}")

    return tell


class _Meter:
    """Totals, and rates since the start; what was there from an earlier attempt is not counted as speed."""

    def __init__(self, bytes_to_write: int) -> None:
        self._to_write = bytes_to_write
        self._started = time.monotonic()
        self._read = self._written = self._resumed = 0

    def add(self, read: int, written: int) -> dict[str, Any]:
        self._read += read
        self._written += written
        self._resumed += written if read == 0 else 0
        seconds = max(time.monotonic() - self._started, 1e-6)
        fresh = self._written - self._resumed
        left = (self._to_write - self._written) * seconds / fresh if fresh else None
        return {
            "bytes_read": self._read,
            "bytes_written": self._written,
            "bytes_to_write": self._to_write,
            "percent": round(100 * self._written / max(self._to_write, 1), 1),
            "read_bytes_per_second": round(self._read / seconds),
            "write_bytes_per_second": round(fresh / seconds),
            "seconds_left": None if left is None else round(left, 1),
        }


def _words(state: dict[str, Any]) -> str:
    left = "" if state["seconds_left"] is None else f", {_duration(state['seconds_left'])} left"
    read, written = state["read_bytes_per_second"], state["write_bytes_per_second"]
    rates = f"read at {bytes_text(read)}/s, written at {bytes_text(written)}/s"
    return f"{bytes_text(state['bytes_read'])} {rates}{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cost(done: Merge, roofline: Roofline | None) -> dict[str, Any]:
    """What a merge took, for JSON: rates over the streaming part, share of the roofline if that was
    measured.
    """
    share = None
    if roofline is not None and not done.bytes_resumed:
        share = round(roofline.seconds / max(done.stream_seconds, 1e-9), 3)
    seconds = max(done.stream_seconds, 1e-9)
    return {
        "read_bytes_per_second": round(done.bytes_read / seconds),
        "write_bytes_per_second": round(done.bytes_written / seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "roofline_seconds": None if roofline is None else round(roofline.seconds, 3),
        "roofline_share": share,
    }


def show_cost(result: Mapping[str, Any]) -> None:
    """The same for people."""
    resumed = f" ({bytes_text(result['bytes_resumed'])} was there already)" if result["bytes_resumed"] else ""
    say(
        f"  read {bytes_text(result['bytes_read'])} at {bytes_text(result['read_bytes_per_second'])}/s, "
        f"wrote {bytes_text(result['bytes_written'])} at "
        f"{bytes_text(result['write_bytes_per_second'])}/s{resumed}"
    )
    if result["send_seconds"]:
        say(f"  sent {bytes_text(result['bytes_sent'])} in {result['send_seconds']:.1f} s")
    say(f"  {result['seconds']:.1f} s, peak memory {bytes_text(result['peak_memory_bytes'])}")
    if result["roofline_share"] is not None:
        say(
            f"  {100 * result['roofline_share']:.0f}% of the roofline: plain reads and writes, measured "
            f"on a sample, "
            f"would take {result['roofline_seconds']:.1f} s"
        )


def told_by_another(crew: Crew, done: Merge) -> dict[str, Any]:
    """A line of what this process did for a merge by several; its result is none, as rank 0 gives that of
    all.
    """
    if done.bytes_written:
        note(
            f"{crew.name}: read {bytes_text(done.bytes_read)}, wrote {bytes_text(done.bytes_written)} in "
            f"{done.stream_seconds:.1f} s"
        )
    return {}
