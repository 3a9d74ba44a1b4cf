"""One store behind URLs: its driver, its listings (remembered for a moment), reads and writes that are tried
again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blake3 import blake3

from pma.errors import IncompleteError, MissingExtra, StorageError, UsageError, printable
from pma.remote.location import credentials_in, redacted
from pma.remote.retrying import ShortRead, retried

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

# a command looks at the same folder several times in a row; what it must know exactly, it asks for anew
_LISTING_SECONDS = 10.0
_DRIVERS_IN_EXTRA = ("s3", "s3a", "gs", "gcs")
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "crc32c")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# the driver holds whole parts in memory while they are sent; by default ten of 50 MiB
_SENDING: Mapping[str, Mapping[str, int]] = {
    "s3": {"chunksize": 16 * 2**20, "max_concurrency": 4},
    "s3a": {"chunksize": 16 * 2**20, "max_concurrency": 4},
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a listing says of a name.

    `stamp`: a number that changes when the file does, made from its etag (or else its time). `mtime_ns`:
    when it was written, 0 where the store does not say.
    """

    size_bytes: int
    is_folder: bool
    stamp: int
    mtime_ns: int


class Store:
    """A store, by the URL it was named with. Thread-safe; places are URLs without their protocol."""

    def __init__(self, protocol: str, place: str) -> None:
        self.protocol = protocol
        self._place = place
        self._secrets = credentials_in(f"{protocol}://{place}")
        self._listings: dict[str, tuple[float, Mapping[str, Entry]]] = {}
        self._lock, self._forgotten = threading.Lock(), 0

    def __reduce__(self) -> tuple[type[Store], tuple[str, str]]:
        return Store, (self.protocol, self._place)  # another process has a connection of its own

    def url(self, place: str) -> str:
        """The URL of a place, without any credentials: for messages and records."""
        return redacted(f"{self.protocol}://{place}")

    @cached_property
    def _driver(self) -> AbstractFileSystem:
        import fsspec

        try:
            # options come from the driver's own sources: its environment variables, files, and fsspec's
            # but for one: where one thread lists what another just wrote, the driver would remember what was
            return fsspec.core.url_to_fs(f"{self.protocol}://{self._place}", use_listings_cache=False)[0]
        except ImportError as error:
            if self.protocol in _DRIVERS_IN_EXTRA:
                raise MissingExtra(f"{self.protocol}://", "remote", "its driver") from error
            raise UsageError(
                f"{self.protocol}:// needs a driver that is not installed: {printable(self._shown(error))}"
            ) from error
        except ValueError as error:
            raise UsageError(f"{self.url(self._place)}: {printable(self._shown(error))}") from error

    def _path(self, place: str) -> str:
        return str(self._driver._strip_protocol(f"{self.protocol}://{place}"))

    def _tried(self, doing: str, place: str, action: Callable[[], T]) -> T:
        """What `action` returns, tried again where that helps. Raises FileNotFoundError, or StorageError."""
        try:
            return retried(action)
        except (FileNotFoundError, NotADirectoryError, ShortRead):
            raise
        except Exception as error:
            refused = " (access was refused: check the credentials)" if _is_refusal(error) else ""
            text = printable(self._shown(error)) or "no reason given"
            raise StorageError(
                f"{self.url(place)}: {doing} failed{refused}: {type(error).__name__}: {text}"
            ) from error

    def _shown(self, error: BaseException) -> str:
        """What a driver says, which may quote the URL it was given, or parts of it."""
        text = redacted(str(error))
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    def listing(self, place: str) -> Mapping[str, Entry]:
        """What lies directly in a folder, by name; nothing where there is no such folder."""
        known = self._listings.get(place)
        if known is not None and time.monotonic() - known[0] < _LISTING_SECONDS:
            return known[1]
        path, asked_at, forgotten = self._path(place), time.monotonic(), self._forgotten

        def ask() -> list[dict[str, Any]]:
            self._driver.invalidate_cache(path)
            found: list[dict[str, Any]] = self._driver.ls(path, detail=True)
            return found

        try:
            answer = self._tried("listing", place, ask)
        except (FileNotFoundError, NotADirectoryError):
            answer = []
        # a listing of a file is that file, and some stores list a folder in itself
        entries = {
            str(found["name"]).rstrip("/").rsplit("/", 1)[-1]: _entry(found)
            for found in answer
            if str(found["name"]).rstrip("/") != path.rstrip("/")
        }
        with self._lock:
            if forgotten == self._forgotten:  # or another thread knows that something changed since we asked
                self._listings[place] = asked_at, entries
        return entries

    def forget(self, place: str) -> None:
        """Ask anew for the listings of a folder and of those below it."""
        with self._lock:
            self._forgotten += 1
            for known in list(self._listings):
                if known == place or known.startswith(f"{place}/"):
                    del self._listings[known]

    def entry(self, place: str) -> Entry | None:
        """What one place is, asked for by itself; None where nothing is there."""
        path = self._path(place)

        def ask() -> dict[str, Any]:
            self._driver.invalidate_cache(path)
            found: dict[str, Any] = self._driver.info(path)
            return found

        try:
            return _entry(self._tried("looking it up", place, ask))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, place: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly those bytes of a file. Raises IncompleteError where it has fewer, or is gone."""
        if length_bytes == 0:
            return b""
        path = self._path(place)

        def ask() -> bytes:
            data: bytes = self._driver.cat_file(path, start=offset_bytes, end=offset_bytes + length_bytes)
            if len(data) != length_bytes:
                self._refuse_shorter(place, offset_bytes + length_bytes)
                raise ShortRead(f"{len(data)} bytes came of {length_bytes}")
            return data

        try:
            return self._tried(f"reading at byte {offset_bytes}", place, ask)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IncompleteError(
                f"{self.url(place)} does not exist (any more); a checkpoint needs all of its files"
            ) from error
        except ShortRead as error:
            raise StorageError(
                f"{self.url(place)}: reading at byte {offset_bytes}: {error}, repeatedly"
            ) from None
        except StorageError:
            # what a store says of bytes beyond the end differs; what the file is now does not
            self._refuse_shorter(place, offset_bytes + length_bytes)
            raise

    def _refuse_shorter(self, place: str, end: int) -> None:
        found = self.entry(place)
        if found is None or found.size_bytes < end:
            ends = "is gone" if found is None else f"ends at byte {found.size_bytes}"
            raise IncompleteError(
                f"{self.url(place)} {ends}, before the data its header promises; "
                "it was cut short, or changed while it was read"
            )

    def send(self, file: Path, place: str) -> Entry:
        """Put a local file there, and look at what arrived. Raises StorageError where it has another size."""
        path, size_bytes = self._path(place), file.stat().st_size

        def put() -> None:
            self._driver.put_file(str(file), path, **_SENDING.get(self.protocol, {}))

        self._tried("sending", place, put)
        return self._arrived(place, size_bytes)

    def send_bytes(self, data: bytes, place: str) -> Entry:
        """Put a small file there."""
        path = self._path(place)
        self._tried("sending", place, lambda: self._driver.pipe_file(path, data))
        return self._arrived(place, len(data))

    def _arrived(self, place: str, size_bytes: int) -> Entry:
        found = self.entry(place)
        if found is None or found.size_bytes != size_bytes:
            what = "is not there" if found is None else f"has {found.size_bytes} bytes"
            raise StorageError(f"{self.url(place)} {what} after {size_bytes} bytes were sent; try again")
        return found

    def remove(self, place: str) -> None:
        """Remove a file, if it is there."""
        path = self._path(place)
        try:
            self._tried("removing", place, lambda: self._driver.rm_file(path))
        except FileNotFoundError:
            return


def _entry(found: Mapping[str, Any]) -> Entry:
    is_folder = found.get("type") == "directory"
    tag = next((found[name] for name in _TAGS if found.get(name) is not None), None)
    time_ns = _time_ns(next((found[name] for name in _TIMES if found.get(name) is not None), None))
    size_bytes = found.get("size")
    return Entry(
        size_bytes=size_bytes if isinstance(size_bytes, int) and not is_folder else 0,
        is_folder=is_folder,
        stamp=int.from_bytes(blake3(str(tag or time_ns).encode()).digest()[:7], "big"),
        mtime_ns=time_ns,
    )


def _time_ns(value: object) -> int:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return 0
    if isinstance(value, datetime):
        value = value.timestamp()
    return round(value * 1e9) if isinstance(value, (int, float)) and 0 <= value < 2**33 else 0


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
