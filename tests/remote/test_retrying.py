"""Which failures are tried again, how often, and after how long."""

import errno
from collections.abc import Callable

import pytest

from pma.remote import retrying
from pma.remote.retrying import ATTEMPTS, ShortRead, is_transient, retried, waits


class EndpointConnectionError(Exception):
    """As botocore names it."""


class ClientPayloadError(Exception):
    """As aiohttp names it."""


class HttpError(Exception):
    """As gcsfs has it: a code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"status {code}")
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.EBUSY, "Please reduce your request rate."),
        OSError(errno.EREMOTEIO, "internal error"),
        HttpError(503),
        HttpError(429),
        ClientPayloadError(),
        EndpointConnectionError(),
        ShortRead(),
    ],
)
def test_what_passes_by_itself(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such key"),
        PermissionError("Forbidden"),
        HttpError(403),
        HttpError(404),
        HttpError(416),
        OSError(errno.EINVAL, "bad request"),
        ValueError("bad bucket"),
        IsADirectoryError(),
    ],
)
def test_what_does_not(error: Exception) -> None:
    assert not is_transient(error)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(retrying.time, "sleep", seconds.append)
    return seconds


def failing(error: Exception, times: int) -> tuple[Callable[[], str], list[int]]:
    """An action that fails so many times, and a count of its calls."""
    calls = [0]

    def action() -> str:
        calls[0] += 1
        if calls[0] <= times:
            raise error
        return "done"

    return action, calls


def test_tried_again_until_it_works(slept: list[float]) -> None:
    action, calls = failing(TimeoutError(), ATTEMPTS - 1)
    assert retried(action) == "done"
    assert (calls[0], len(slept)) == (ATTEMPTS, ATTEMPTS - 1)


def test_given_up_at_last(slept: list[float]) -> None:
    action, calls = failing(TimeoutError("it is still busy"), 99)
    with pytest.raises(TimeoutError, match="still busy"):
        retried(action)
    assert calls[0] == ATTEMPTS


@pytest.mark.parametrize("error", [PermissionError(), FileNotFoundError()])
def test_not_tried_again(error: Exception, slept: list[float]) -> None:
    action, calls = failing(error, 99)
    with pytest.raises(type(error)):
        retried(action)
    assert (calls[0], slept) == (1, [])


def test_where_nobody_answers_it_is_given_up_soon(slept: list[float]) -> None:
    action, calls = failing(EndpointConnectionError(), 99)
    with pytest.raises(EndpointConnectionError):
        retried(action)
    assert calls[0] == 3


def test_waits_grow_and_differ() -> None:
    many = [list(waits()) for _ in range(200)]
    for attempt in range(ATTEMPTS - 1):
        longest = min(0.25 * 2**attempt, 20)
        column = [row[attempt] for row in many]
        assert longest / 10 <= min(column) < 0.5 * longest < max(column) <= longest
