"""Failures as processes tell them to each other: in a journal, and raised again where they are heard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pma.engine.together.places import Words
from pma.errors import (
    FormatError,
    IncompleteError,
    InputError,
    Interrupted,
    MismatchError,
    NonfiniteError,
    PmaError,
    SpaceError,
    StorageError,
    UsageError,
)

_TOLD = (FormatError, IncompleteError, InputError, Interrupted, MismatchError, NonfiniteError)
_KINDS = {kind.__name__: kind for kind in (*_TOLD, SpaceError, StorageError, UsageError)}


def tell_failure(journal: Words, error: BaseException) -> None:
    """Say in a journal what this process fails with, if it still can."""
    with suppress(OSError, StorageError):
        journal.say(**told_of(error))


def told_of(error: BaseException) -> dict[str, Any]:
    """A failure as plain values, for `failure_in`."""
    kind = type(error).__name__ if type(error).__name__ in _KINDS else InputError.__name__
    if isinstance(error, KeyboardInterrupt):
        kind, error = Interrupted.__name__, Interrupted("interrupted while merging")
    return {"failed": {"kind": kind, "message": str(error) or type(error).__name__}}


def failure_in(said: Mapping[str, Any]) -> PmaError | None:
    """What a followed process failed with, if it told."""
    told = said.get("failed")
    return None if told is None else _KINDS.get(told["kind"], InputError)(told["message"])


def said_by(who: str, error: PmaError) -> PmaError:
    """The error with who failed with it in front, once."""
    text = str(error)
    return error if text.startswith(who) else type(error)(f"{who}: {text}")
