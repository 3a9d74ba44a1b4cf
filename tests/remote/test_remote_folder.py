"""Range reads: what is asked for, how much at once, and what happens when the store misbehaves."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from pma.errors import FormatError, IncompleteError, StorageError
from pma.formats.folder import chunks_of, open_folder
from pma.formats.remote_folder import IN_FLIGHT, REQUEST_BYTES, RemoteFolder
from pma.remote import location

DATA = np.random.default_rng(0).bytes(3 * REQUEST_BYTES + 1000)


class Watched:
    """A driver that notes the ranges it is asked for, and fails as told."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.ranges: list[tuple[int, int]] = []
        self.failures: list[Exception | int] = []  # an error to raise, or a number of bytes to give instead
        self.seconds = 0.0
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        with self._lock:
            self.ranges.append((start, end))
            self._now += 1
            self.most_at_once = max(self._now, self.most_at_once)
            failure = self.failures.pop() if self.failures else None
        time.sleep(self.seconds)
        with self._lock:
            self._now -= 1
        if isinstance(failure, Exception):
            raise failure
        data: bytes = self._driver.cat_file(path, start=start, end=end)
        return data if failure is None else data[:failure]


@pytest.fixture
def folder(memory: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[RemoteFolder, Watched]:
    monkeypatch.setattr("pma.remote.retrying._FIRST_WAIT_SECONDS", 0.001)
    memory.pipe_file("/run/model.bin", DATA)
    path = location("memory://run")
    watched = Watched(memory)
    path.store.__dict__["_driver"] = watched  # type: ignore[attr-defined]
    opened = open_folder(path)
    assert isinstance(opened, RemoteFolder)
    return opened, watched


def read(folder: RemoteFolder, *places: tuple[int, int]) -> list[bytes]:
    buffers = [bytearray(length) for _, length in places]
    folder.read_many(
        ("model.bin", offset, [memoryview(buffer)])
        for (offset, _), buffer in zip(places, buffers, strict=True)
    )
    return [bytes(buffer) for buffer in buffers]


def expected(*places: tuple[int, int]) -> list[bytes]:
    return [DATA[offset : offset + length] for offset, length in places]


def test_nothing_is_read_but_what_is_asked(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    assert (opened.names(), opened.size_bytes("model.bin")) == (["model.bin"], len(DATA))
    assert watched.ranges == []
    assert read(opened, (1000, 50)) == expected((1000, 50))
    assert watched.ranges == [(1000, 1050)]


def test_neighbours_are_read_together_in_any_order(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    places = [(500, 100), (0, 100), (100, 50), (3 * REQUEST_BYTES, 10)]
    assert read(opened, *places) == expected(*places)
    assert sorted(watched.ranges) == [(0, 600), (3 * REQUEST_BYTES, 3 * REQUEST_BYTES + 10)]


def test_overlapping_requests(folder: tuple[RemoteFolder, Watched]) -> None:
    places = [(0, 1000), (10, 20), (500, 1000)]
    assert read(folder[0], *places) == expected(*places)


def test_what_is_large_is_read_in_parts_at_once(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    watched.seconds = 0.05
    assert read(opened, (0, len(DATA))) == [DATA]
    assert len(watched.ranges) == 4
    assert max(stop - start for start, stop in watched.ranges) <= REQUEST_BYTES
    assert watched.most_at_once == 4


def test_so_many_requests_at_once_and_no_more(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    watched.seconds = 0.02
    gap = len(DATA) // 40
    assert gap > 2**18
    places = [(start, 10) for start in range(0, len(DATA) - 10, gap)]
    assert read(opened, *places) == expected(*places)
    assert (len(watched.ranges), watched.most_at_once) == (len(places), IN_FLIGHT)


def test_failures_that_pass_are_not_seen(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    watched.failures = [TimeoutError(), ConnectionResetError(), 7, 0]
    assert read(opened, (100, 1000)) == expected((100, 1000))
    assert len(watched.ranges) == 5


def test_a_store_that_goes_on_giving_too_little(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    watched.failures = [7] * 99
    with pytest.raises(StorageError, match="7 bytes came of 1000"):
        read(opened, (100, 1000))


def test_a_refusal_is_told_at_once(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    watched.failures = [PermissionError("Forbidden")]
    with pytest.raises(
        StorageError, match=r"memory://run/model.bin: reading at byte 100 failed .*credentials"
    ):
        read(opened, (100, 1000))
    assert len(watched.ranges) == 1


def test_a_file_that_became_shorter_is_told_at_once(
    folder: tuple[RemoteFolder, Watched], memory: Any
) -> None:
    opened, watched = folder
    memory.pipe_file("/run/model.bin", DATA[:500])
    with pytest.raises(IncompleteError, match="ends at byte 500"):
        read(opened, (100, 1000))
    assert len(watched.ranges) == 1
    memory.rm("/run/model.bin")
    with pytest.raises(IncompleteError, match="does not exist"):
        read(opened, (100, 1000))


def test_a_status_tells_a_change_when_asked_anew(folder: tuple[RemoteFolder, Watched], memory: Any) -> None:
    opened, _ = folder
    before = opened.status("model.bin")
    assert before[0] == len(DATA)
    memory.pipe_file("/run/model.bin", DATA)
    assert opened.status("model.bin") == before  # as last listed
    opened.refresh()
    assert opened.status("model.bin") != before
    with pytest.raises(IncompleteError, match="does not exist"):
        opened.status("other.bin")


def test_read_whole_believes_no_size(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    with pytest.raises(FormatError, match="not believable"):
        opened.read_whole("model.bin", 1000)
    assert watched.ranges == []
    assert opened.read_whole("model.bin", len(DATA)) == DATA


def test_chunks_come_in_order(folder: tuple[RemoteFolder, Watched]) -> None:
    found = [bytes(chunk) for chunk in chunks_of(folder[0], "model.bin", len(DATA), 2**20)]
    assert found == [DATA[start : start + 2**20] for start in range(0, len(DATA), 2**20)]


def test_each_asks_for_many_at_once(folder: tuple[RemoteFolder, Watched]) -> None:
    opened, watched = folder
    watched.seconds = 0.05

    def first_byte(name: str) -> bytes:
        buffer = bytearray(1)
        opened.read(name, 0, [memoryview(buffer)])
        return bytes(buffer)

    assert opened.each(first_byte, ["model.bin"] * 8) == [DATA[:1]] * 8
    assert watched.most_at_once == 8
