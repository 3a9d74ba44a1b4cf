"""The page on disk: replaced whole, so that a browser never reads half of one."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from pma.errors import printable
from pma.reporting import PAGE_FILE, Watched, thinned, watch_page
from pma.watch.loop import State

_RELOAD_SECONDS = 5


class PageFile:
    """`report.html` in `folder`. Raises MissingExtra where the page cannot be drawn."""

    def __init__(self, folder: Path) -> None:
        from pma.reporting.charts import require_altair

        require_altair()
        self.path = folder / PAGE_FILE

    def show(self, state: State) -> None:
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(watch_page(_watched(state)), encoding="utf-8")
        partial.replace(self.path)


def _watched(state: State) -> Watched:
    wanted = state.wanted
    apart = "" if wanted.every is None else f", {wanted.every} apart"
    run = state.run.resolve()
    return Watched(
        run=printable(run.name),
        merge=f"merged: {wanted.scheme} of up to {wanted.last}{apart}",
        points=[point.to_json() for point in thinned(state.points)],
        of_points=len(state.points),
        abandoned=[point.to_json() for point in thinned(state.abandoned)],
        waiting=[f"{printable(path.name)}: {printable(reason)}" for path, reason in state.waiting],
        notes=[printable(note) for note in state.notes],
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        reload_seconds=_RELOAD_SECONDS if state.live else None,
    )
