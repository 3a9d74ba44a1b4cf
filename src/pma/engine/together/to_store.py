"""Rank 0's part where several processes make an output in a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pma.engine import provenance
from pma.engine.building import SAVE_SECONDS, kept_up
from pma.engine.commit import Count, How, refuse_inside_run
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.together.crew import Crew
from pma.engine.together.driver import Driver, Held, check_all_there
from pma.engine.together.hands import remove_left_over
from pma.engine.together.in_store import StoreAttempt, as_begun, refuse_in_store, store_attempt
from pma.engine.together.part import Place, Working
from pma.engine.together.places import is_made, marker_at
from pma.remote import RemotePath


def begun_as(
    plan: Plan, out: Path, processes: int, *, fresh: bool, tell: Callable[[str], None] | None
) -> Plan:
    """`plan` in as many files as an output in a store has or was begun with, else as there are processes:
    `tell` hears of that.
    """
    if not isinstance(out, RemotePath):
        return plan
    if is_made(out):
        return plan.resharded(len(provenance.load(out)["outputs"]))
    files, begun = len(plan.layout.files), as_begun(plan, out, fresh=fresh)
    if fresh or not marker_at(out):
        begun = plan.resharded(processes)
    if tell is not None and files < processes:
        tell(_files_text(files, len(begun.layout.files), processes))
    return begun


def _files_text(files: int, written: int, processes: int) -> str:
    few = f"{files} output files are fewer than {processes} processes, and in a store each has one writer: "
    if written == files:
        return few + "some processes will have nothing to do"
    return few + f"re-sharded into {written}"


def led_to_store(plan: Plan, out: RemotePath, crew: Crew, how: How) -> dict[str, Any]:
    """Rank 0: meet the others, send files as they do, complete the output. Returns what it took."""
    refuse_in_store(plan, out, fresh=how.get("fresh", False))
    refuse_inside_run(plan, out, inside_run=how.get("inside_run", False))
    count, waiting = Count(how.get("progress")), StopFlag()
    save_seconds = how.get("save_seconds", SAVE_SECONDS)
    names = [str(rank) for rank in range(1, crew.size)]
    driver = Driver(plan, names, crew, progress=count.add, tell=how.get("tell"))
    with closing(driver), driver.telling(), store_begun(plan, out, driver, how, driver.meet) as held:
        resumed, streaming = held.bytes_done, time.monotonic()
        if resumed:
            count.add(0, resumed)
        parts = plan.partition(crew.size, whole_files=True, done=held.digests)
        driver.hand_out(parts)
        place = Place(out, held.token, silent_seconds=crew.silent_seconds)
        with kept_up([held, driver], waiting, save_seconds), closing(place):
            with closing(Working(place, "0", crew.name)) as working:
                working.take(plan)
                made = working.carry_out(
                    parts[0],
                    progress=count.add,
                    save_seconds=save_seconds,
                    staging=how.get("staging"),
                    sha256=how.get("sha256", False),
                    called_off=waiting,
                )
                held.hear(made, working.sent)
            driver.await_parts(waiting)
            check_all_there(held.digests, plan, out)
            held.complete(sha256=how.get("sha256", False), hash_sources=how.get("hash_sources", False))
        held.finish()
    remove_left_over(out, how.get("staging"))
    seconds = time.monotonic() - streaming
    written = plan.bytes_to_write - resumed
    return {"resumed": resumed, "read": count.read, "written": written, "stream_seconds": seconds}


@contextmanager
def store_begun(
    plan: Plan, out: RemotePath, driver: Driver, how: How, meet: Callable[[Held], None]
) -> Iterator[StoreAttempt]:
    """An attempt at an output in a store, begun after `meet` found that all see the same."""
    fresh, break_lock = how.get("fresh", False), how.get("break_lock", False)
    with store_attempt(plan, out, fresh=fresh, break_lock=break_lock, agree=meet) as held:
        if held.digests:
            driver.record(held.digests, held.sent)
        held.forget_others()
        with driver.telling():  # before what is told of goes
            yield held
