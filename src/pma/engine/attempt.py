"""An attempt at an output: begun, and after a failure kept for the next one, or removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pma.engine.building import Building
from pma.engine.plan import Plan
from pma.errors import (
    IncompleteError,
    Interrupted,
    MismatchError,
    NonfiniteError,
    PmaError,
    SpaceError,
    StorageError,
    UsageError,
)
from pma.formats.files import NO_ROOM

# what may be otherwise at the next attempt
_MAY_GO_ON = (Interrupted, SpaceError, StorageError, IncompleteError, UsageError)


@contextmanager
def attempt(
    plan: Plan,
    out: Path,
    *,
    fresh: bool = False,
    break_lock: bool = False,
    agree: Callable[[Building], None] | None = None,
) -> Iterator[Building]:
    """The building of an output, begun. After a failure, keep what a later attempt can go on with, and say
    so; remove anything else.

    `agree` is called while nothing is changed yet but for the lease; where it raises, nothing will be.
    """
    building = _begun(plan, out, fresh=fresh, break_lock=break_lock, agree=agree)
    try:
        with errors_of_ours(out):
            yield building
    except BaseException as error:
        if isinstance(error, (MismatchError, NonfiniteError)) or not building.is_resumable:
            building.discard()
        elif isinstance(error, _MAY_GO_ON) and building.is_ours:
            share = 100 * building.bytes_done // max(building.plan.bytes_to_write, 1)
            raise type(error)(
                f"{error}. About {share}% of {building.out} is done and kept in {building.folder.name}: "
                "the same command goes on, with --fresh it starts over"
            ) from error
        raise
    finally:
        building.close()


def _begun(
    plan: Plan, out: Path, *, fresh: bool, break_lock: bool, agree: Callable[[Building], None] | None
) -> Building:
    with errors_of_ours(out):
        building = Building(plan, out, break_lock=break_lock)
        if agree is not None:
            try:
                agree(building)
            except BaseException:
                if building.is_new:
                    building.discard()
                building.close()
                raise
        building.begin(fresh=fresh)
        return building


@contextmanager
def errors_of_ours(out: Path) -> Iterator[None]:
    """Whatever fails in the block, be it a sync or a journal without room, is one of the errors that we
    promise.
    """
    try:
        yield
    except OSError as error:
        raise of_ours(error, out) from error
    except KeyboardInterrupt:
        raise Interrupted("interrupted while merging") from None


def of_ours(error: OSError, out: Path) -> PmaError:
    """What the system said while `out` was written, as one of the errors that we promise."""
    kind = SpaceError if error.errno in NO_ROOM else StorageError
    where = error.filename if isinstance(error.filename, str) else out
    return kind(f"{where}: writing failed: {error.strerror or error}")
