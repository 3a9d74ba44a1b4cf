"""The exception tree. Every error that a user can cause is one of these; the command line turns them into one
paragraph. Status 1, a check that found something, is a result and no error.

PmaError                 exit status
├── UsageError           2  the request cannot be meant: unknown scheme, output exists, no such window
│   └── MissingExtra     2  an optional dependency is not installed
├── InputError           3  what was read cannot be used
│   ├── FormatError      3  a file breaks the rules of its format, or tries something hostile
│   ├── IncompleteError  3  a checkpoint is still being written, or was cut short
│   ├── MismatchError    3  sources do not fit together
│   ├── NonfiniteError   3  a value, or a mean, is NaN or infinite
│   ├── StorageError        3  the storage failed to give what is there
│   └── SpaceError       3  no room for the output
└── Interrupted          4  stopped on request; nothing looks complete, the same command goes on
"""

from __future__ import annotations


class PmaError(Exception):
    """Base of every error with a message for people; `exit_status` is what the command line returns."""

    exit_status = 3


class UsageError(PmaError):
    """The request itself is wrong; nothing was read or written."""

    exit_status = 2


class MissingExtra(UsageError):
    """An optional dependency is needed: says which extra to install."""

    def __init__(self, what_for: str, extra: str, missing: str) -> None:
        super().__init__(
            f"{what_for} needs {missing}, which is not installed: pip install 'pma-llm[{extra}]'"
        )


class InputError(PmaError):
    """What was read cannot be used."""


class FormatError(InputError):
    """A file breaks the rules of its format."""


class IncompleteError(InputError):
    """A checkpoint is still being written, or was cut short."""


class MismatchError(InputError):
    """Sources of one merge do not fit together."""


class NonfiniteError(InputError):
    """A value of a source, or a mean, is NaN or infinite."""


class StorageError(InputError):
    """The storage failed while reading or writing; trying again may help."""


class SpaceError(InputError):
    """There is no room for the output."""


class Interrupted(PmaError):
    """Stopped on request."""

    exit_status = 4


def printable(text: str, limit: int = 200) -> str:
    """`text` from an untrusted file, made safe to print: control characters escaped, length capped."""
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return shown + "…" if len(text) > limit else shown
