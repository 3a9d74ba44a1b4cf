"""A merge whose parts the nodes of a Ray cluster carry out; this process alone begins and commits."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

from pma.cluster import Cluster, OnRay, connected
from pma.engine.attempt import attempt
from pma.engine.building import SAVE_SECONDS, Building, kept_up
from pma.engine.commit import Count, How, Merge, check_output, name_warnings, refuse_inside_run
from pma.engine.on_ray.meeting import Meeting
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.together.driver import check_all_there
from pma.engine.together.hands import remove_left_over
from pma.engine.together.in_store import refuse_in_store, remove_words
from pma.engine.together.part import Beating
from pma.engine.together.places import is_made, marker_at
from pma.engine.together.to_store import begun_as, store_begun
from pma.engine.together.writing import commit
from pma.remote import RemotePath


def write(plan: Plan, out: Path, on: OnRay, **how: Unpack[How]) -> Merge:
    """As `engine.write`, to the bit, by the nodes of a Ray cluster.

    Raises UsageError or StorageError for a cluster that cannot be used, MismatchError where a node sees other
    sources, StorageError where it cannot write; Interrupted where the merge was called off. What is done is
    kept.
    """
    started = time.monotonic()
    if isinstance(out, RemotePath):
        refuse_inside_run(plan, out, inside_run=how.get("inside_run", False))
    else:
        check_output(plan, out, inside_run=how.get("inside_run", False))
    with connected(on) as cluster:
        lead = _led_to_store if isinstance(out, RemotePath) else _led
        figures = lead(plan, out, cluster, on, how)
    return Merge(
        path=out,
        checkpoints=len(plan.sources),
        scheme=plan.options.scheme_text,
        bytes_read=figures["read"],
        bytes_written=figures["written"],
        bytes_resumed=figures["resumed"],
        seconds=time.monotonic() - started,
        stream_seconds=figures["stream_seconds"],
        durable_seconds=figures["stream_seconds"],
        warnings=name_warnings(out),
    )


def _led(plan: Plan, out: Path, cluster: Cluster, on: OnRay, how: How) -> dict[str, Any]:
    """Into a folder. Returns bytes that were there, and what the others took."""
    count = Count(how.get("progress"))
    met = Meeting(plan, out, cluster, on, how)
    save_seconds = how.get("save_seconds", SAVE_SECONDS)
    fresh, break_lock = how.get("fresh", False), how.get("break_lock", False)
    with (
        closing(met.driver),
        attempt(plan, out, fresh=fresh, break_lock=break_lock, agree=met.meet) as building,
        met.driver.telling(),  # before what is told of goes
    ):
        resumed, streaming, stop = building.bytes_done, time.monotonic(), StopFlag()
        if resumed:
            count.add(0, resumed)
        with kept_up([building], stop, save_seconds):
            met.carry_out(building, building.output.digests, count, stop)
        building.save()
        seconds = time.monotonic() - streaming
        _commit(building, how, save_seconds)
    return _figures(plan, resumed, count.read, seconds)


def _commit(building: Building, how: How, save_seconds: float) -> None:
    sha256, hash_sources = how.get("sha256", False), how.get("hash_sources", False)
    with kept_up([Beating(building.show_life)], StopFlag(), save_seconds):  # to hash all again may take long
        commit(building, sha256=sha256, hash_sources=hash_sources)


def _led_to_store(plan: Plan, out: Path, cluster: Cluster, on: OnRay, how: How) -> dict[str, Any]:
    """As `_led`, into a store: a part is whole files, which whoever made them sends."""
    assert isinstance(out, RemotePath)
    fresh, count, stop = how.get("fresh", False), Count(how.get("progress")), StopFlag()
    slots = sum(node.slots for node in cluster.nodes())
    plan = begun_as(plan, out, max(slots, 1), fresh=fresh, tell=how.get("tell"))
    refuse_in_store(plan, out, fresh=fresh)
    if is_made(out) and marker_at(out):  # whoever finished it was killed before it tidied up
        remove_words(out)
        return _figures(plan, plan.bytes_to_write, 0, 0.0)
    met = Meeting(plan, out, cluster, on, how)
    with (
        closing(met.driver),
        met.driver.telling(),
        store_begun(plan, out, met.driver, how, met.meet) as held,
    ):
        resumed, streaming = held.bytes_done, time.monotonic()
        if resumed:
            count.add(0, resumed)
        with kept_up([held, met.driver], stop, how.get("save_seconds", SAVE_SECONDS)):
            met.carry_out(held, held.digests, count, stop)
            check_all_there(held.digests, plan, out)
            held.complete(sha256=how.get("sha256", False), hash_sources=how.get("hash_sources", False))
        held.finish()
    remove_left_over(out, how.get("staging"))
    return _figures(plan, resumed, count.read, time.monotonic() - streaming)


def _figures(plan: Plan, resumed: int, read: int, seconds: float) -> dict[str, Any]:
    written = plan.bytes_to_write - resumed
    return {"resumed": resumed, "read": read, "written": written, "stream_seconds": seconds}
