"""Trying again: which failures of a store pass by themselves, and how long to wait for that."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 8
_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 20.0
_STATUS = (408, 425, 429, 500, 502, 503, 504)
_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
}
# of the drivers and what they stand on; they are known by name, because none of them need be installed
_NAMES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProtocolError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
    "Timeout",
    "TransportError",
}
# nobody answered at all: rather a wrong address than a busy server
_NOBODY = {"ClientConnectorError", "ConnectTimeoutError", "ConnectionRefusedError", "EndpointConnectionError"}
_ATTEMPTS_AT_NOBODY = 3
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class ShortRead(OSError):
    """A store gave fewer bytes than it was asked for."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later: timeouts, broken connections, a busy
    server.
    """
    if isinstance(error, _FINAL):
        return False
    status = _status(error)
    if status is not None:
        return status in _STATUS
    if isinstance(error, (TimeoutError, ConnectionError, ShortRead)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _ERRNO
    return bool(_names(error) & (_NAMES | _NOBODY))


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, as aiohttp, gcsfs and requests do."""
    places = (error, getattr(error, "response", None))
    for value in (
        getattr(place, name, None) for place in places for name in ("status", "status_code", "code")
    ):
        if isinstance(value, int) and value >= 100:
            return value
        if isinstance(value, str) and value.isdecimal():
            return int(value)
    return None


def waits() -> Iterator[float]:
    """Seconds to wait after each failed attempt but the last: exponential, with full jitter, so that many
    clients that failed together do not come back together.
    """
    longest = _FIRST_WAIT_SECONDS
    for _ in range(ATTEMPTS - 1):
        yield random.uniform(0.1 * longest, longest)
        longest = min(2 * longest, _LONGEST_WAIT_SECONDS)


def retried(action: Callable[[], T]) -> T:
    """What `action` returns; after a transient failure it is done again, a few times. Raises what it raised
    last.
    """
    nobody = 0
    for seconds in waits():
        try:
            return action()
        except Exception as error:
            nobody += bool(_names(error) & _NOBODY)
            if not is_transient(error) or nobody == _ATTEMPTS_AT_NOBODY:
                raise
        time.sleep(seconds)
    return action()
