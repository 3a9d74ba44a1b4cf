"""A merge that several processes write into one folder: rank 0 drives, the others carry out their parts."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

from pma.engine.attempt import attempt, errors_of_ours
from pma.engine.building import SAVE_SECONDS, Building, kept_up
from pma.engine.commit import Count, How, Merge, check_output, is_written, name_warnings, refuse_inside_run
from pma.engine.journal import Followed, driver_journal
from pma.engine.lease import is_gone
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.stream import stream
from pma.engine.together.crew import Crew
from pma.engine.together.driver import Driver, check_all_there
from pma.engine.together.hands import remove_left_over
from pma.engine.together.in_store import refuse_in_store, remove_words
from pma.engine.together.part import Beating, Place, Working, pauses
from pma.engine.together.places import driver_at, is_made, meeting_folder
from pma.engine.together.to_store import begun_as, led_to_store
from pma.engine.together.words import said_by
from pma.engine.work import work_of
from pma.errors import PmaError, StorageError, UsageError
from pma.remote import RemotePath

# one that we met went away, as of an earlier launch that was killed only now: the next comes soon
_NEXT_SECONDS = 15.0


def write(plan: Plan, out: Path, **how: Unpack[How]) -> Merge:
    """As `engine.write`, by every process of the `crew` together, to the bit what one writes; each returns
    when the output is there.

    What rank 0 returns is of all processes, what another returns is of itself. Raises MismatchError where a
    process sees other sources, Interrupted where the merge was called off or a process is gone.
    """
    crew = how.get("crew")
    assert crew is not None
    started = time.monotonic()
    tell = how.get("tell") if crew.leads else None
    begun = begun_as(plan, out, crew.size, fresh=how.get("fresh", False), tell=tell)
    if is_made(out) and is_written(begun, out):
        # a launcher started all anew for what came after, or because the end was cut short
        if isinstance(out, RemotePath):
            if crew.leads:
                remove_words(out)
            remove_left_over(out, how.get("staging"))
        return _merge(plan, out, started, resumed=plan.bytes_to_write)
    from pma.engine.compute import load_kernels  # takes a while: a signal amid it may abort the process

    load_kernels(plan.blocks.averaged_types())
    if not crew.leads:
        _refuse_as_rank_0_does(begun, out, crew, how)
        return _followed(plan, out, crew, started, how)
    if not isinstance(out, RemotePath):
        return _led(plan, out, crew, started, how)
    figures = led_to_store(begun, out, crew, how)
    return _merge(plan, out, started, **figures)


def _led(plan: Plan, out: Path, crew: Crew, started: float, how: How) -> Merge:
    check_output(plan, out, inside_run=how.get("inside_run", False))
    count, stop, waiting = Count(how.get("progress")), StopFlag(), StopFlag()
    save_seconds = how.get("save_seconds", SAVE_SECONDS)
    fresh, break_lock = how.get("fresh", False), how.get("break_lock", False)
    names = [str(rank) for rank in range(1, crew.size)]
    driver = Driver(plan, names, crew, progress=count.add, tell=how.get("tell"))
    with (
        closing(driver),
        driver.telling(),
        attempt(plan, out, fresh=fresh, break_lock=break_lock, agree=driver.meet) as building,
        driver.telling(),  # also before what is told of goes
    ):
        resumed, streaming = building.bytes_done, time.monotonic()
        if resumed:
            count.add(0, resumed)
        parts = plan.partition(crew.size, done=building.output.digests)
        driver.hand_out(parts)
        with kept_up([building, driver], stop, save_seconds):
            stream(work_of(plan), [building.output], numbers=parts[0], progress=count.add, stop=stop)
        with kept_up([building, driver], waiting, save_seconds):
            building.save()
            driver.await_parts(waiting)
        durable = time.monotonic() - streaming
        sha256, hash_sources = how.get("sha256", False), how.get("hash_sources", False)
        with kept_up([Beating(building.show_life)], waiting, save_seconds):  # to hash all again may take long
            commit(building, sha256=sha256, hash_sources=hash_sources)
    written = plan.bytes_to_write - resumed
    return _merge(
        plan, out, started, resumed=resumed, read=count.read, written=written, stream_seconds=durable
    )


def commit(building: Building, *, sha256: bool = False, hash_sources: bool = False) -> dict[str, Any]:
    """The last step: every chunk is there, by whomever it was made; the folder gets its name."""
    check_all_there(building.output.digests, building.plan, building.out)
    return building.finish(sha256=sha256, hash_sources=hash_sources)


def _refuse_as_rank_0_does(plan: Plan, out: Path, crew: Crew, how: How) -> None:
    """Raises what rank 0 ends with before it leads, as it has no place yet where it could tell us."""
    inside_run = how.get("inside_run", False)
    try:
        if isinstance(out, RemotePath):
            # of another merge that was begun there rank 0 alone judges: we may be who sees other sources
            refuse_in_store(plan, out, fresh=True)
            refuse_inside_run(plan, out, inside_run=inside_run)
        else:
            check_output(plan, out, inside_run=inside_run)
    except PmaError as error:
        raise said_by(crew.name, error) from error


def _followed(plan: Plan, out: Path, crew: Crew, started: float, how: How) -> Merge:
    count = Count(how.get("progress"))
    with errors_of_ours(out):
        working, place, part = _joined(plan, out, crew)
        plan = working.plan
        streaming = time.monotonic()
        with closing(place):
            try:
                if not len(part) and (tell := how.get("tell")) is not None:
                    tell(f"{crew.name}: nothing to do; {crew.size} processes are more than there is work for")
                save_seconds = how.get("save_seconds", SAVE_SECONDS)
                working.carry_out(
                    part,
                    progress=count.add,
                    save_seconds=save_seconds,
                    staging=how.get("staging"),
                    sha256=how.get("sha256", False),
                )
            except BaseException as error:
                raise working.failed(error) from error
            finally:
                working.close()
            streamed = time.monotonic() - streaming
            place.await_end()
    return _merge(plan, out, started, read=count.read, written=count.written, stream_seconds=streamed)


def _joined(plan: Plan, out: Path, crew: Crew) -> tuple[Working, Place, Part]:
    """Find the folder that our rank 0 drives, say that we see the same sources, and get our part.

    What an earlier launch left there, or another one is doing, is told by a process that is gone, or by parts
    that were handed out before we came.
    """
    folder, passed_by = meeting_folder(out), {""}
    deadline = time.monotonic() + crew.join_seconds
    for pause in pauses():
        holder = driver_at(folder)[0]
        token = holder.get("token", "")
        if token not in passed_by and "released" not in holder and not is_gone(holder):
            driver = Followed(folder / driver_journal(token))
            driver.news()
            if driver.heading is not None:
                passed_by.add(token)
                if not {"parts", "failed"} & driver.said.keys():
                    found = _met(plan, out, token, crew, driver)
                    if found is not None:
                        return found
                    deadline = min(deadline, time.monotonic() + _NEXT_SECONDS)
        if time.monotonic() > deadline:
            raise StorageError(
                f"{crew.name}: rank 0 did not begin in {folder} within {crew.join_seconds:.0f} s, or went "
                "away: it is not running, it refused and said why, or this node does not see that folder"
            )
        time.sleep(pause)
    raise AssertionError("pauses end never")


def _met(
    plan: Plan, out: Path, token: str, crew: Crew, driver: Followed
) -> tuple[Working, Place, Part] | None:
    """As `_joined`, under one lease; None where its holder goes away before it hands out any part."""
    assert driver.heading is not None
    if driver.heading["size"] != crew.size:
        raise UsageError(
            f"{crew.name} was started as one of {crew.size} processes, {driver.heading['who']} as one of "
            f"{driver.heading['size']}; is another launch merging to {out}?"
        )
    place = Place(out, token, silent_seconds=crew.silent_seconds)
    if isinstance(out, RemotePath):
        plan = plan.resharded(driver.heading["files"])
    working = Working(place, str(crew.rank), crew.name)
    try:
        working.take(plan)
        working.agree()
        for pause in pauses():
            parts = place.driver().said.get("parts")
            if parts is not None:
                ranges = tuple(range(*pair) for pair in parts[crew.rank])
                return working, place, Part(ranges=ranges, bytes_to_read=0, bytes_to_write=0)
            holder = driver_at(place.folder)[0]
            gone = is_gone(holder)  # before its last words are heard
            place.check_words()
            if gone or holder.get("token") != token:
                working.close()
                place.close()
                return None
            place.check()
            working.show_life()
            time.sleep(pause)
    except BaseException as error:
        told = working.failed(error)
        working.close()
        place.close()
        raise told from error
    raise AssertionError("pauses end never")


def _merge(plan: Plan, out: Path, started: float, **figures: Any) -> Merge:
    seconds = figures.get("stream_seconds", 0.0)
    return Merge(
        path=out,
        checkpoints=len(plan.sources),
        scheme=plan.options.scheme_text,
        bytes_read=figures.get("read", 0),
        bytes_written=figures.get("written", 0),
        bytes_resumed=figures.get("resumed", 0),
        seconds=time.monotonic() - started,
        stream_seconds=seconds,
        durable_seconds=seconds,
        warnings=name_warnings(out),
    )
