"""What nodes answer: plain values, also where they fail, as an error need not survive a journey as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pma.engine.together.words import said_by, told_of
from pma.errors import Interrupted, PmaError, StorageError

Answer = dict[str, Any]


def answered(who: str, work: Callable[[], Answer]) -> Answer:
    """On a node, called `who`: what `work` gives, or failed with, for `failure_in`. What is wrong with the
    input is told as one process would, what is wrong with a node with its name.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return told_of(Interrupted(f"{who}: called off"))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return told_of(StorageError(f"{who}: {where}{error.strerror or error}"))
    except StorageError as error:
        return told_of(said_by(who, error))
    except PmaError as error:
        return told_of(error)
