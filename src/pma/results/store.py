"""Evaluations in an SQLite file, found by what was merged and by how it was evaluated.

Results are deterministic, so the first one put under a pair of keys stays. The file is untrusted: it may come
from somewhere else, or be no database at all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self

from blake3 import blake3

from pma.errors import FormatError, InputError, PmaError, SpaceError, UsageError, printable

#: where a run's results are, in the run
STORE_FILE = Path(".pma") / "results.sqlite"
_APPLICATION_ID = int.from_bytes(b"PMAr")
_VERSION = 1
_BUSY_SECONDS = 60
_LARGEST_ROW_BYTES = 256 * 2**20
_TABLE = """CREATE TABLE evaluations (
    merge_key TEXT NOT NULL,
    evaluation_key TEXT NOT NULL,
    merge TEXT NOT NULL,
    result TEXT NOT NULL,
    made_at TEXT NOT NULL,
    PRIMARY KEY (merge_key, evaluation_key)
)"""
_SCHEMA = {
    ("table", "evaluations", _TABLE),
    ("index", "sqlite_autoindex_evaluations_1", None),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """An evaluation: what was merged, what came out, and when (UTC, ISO 8601). All its text is untrusted."""

    merge_key: str
    evaluation_key: str
    merge: dict[str, Any]
    result: dict[str, Any]
    made_at: str


def content_key(value: Any) -> str:
    """BLAKE3 (64 hex digits) of `value` as canonical JSON; tuples count as lists, 1 and 1.0 as different.

    Raises ValueError for NaN, infinity and names that are not text; TypeError for what is not JSON.
    """
    return blake3(_canonical_json(value).encode("ascii")).hexdigest()


class Store:
    """Evaluations in the SQLite file `path`, which is made, with its folder, by the first `put`.

    Several processes may use one file, each with its own Store. Raises FormatError where the file is no store
    or is damaged, UsageError where it cannot be opened or written, InputError where it stays locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._has_table = False
        if self._was_written():
            with self._transaction("DEFERRED"):
                pass  # what is wrong with the file is said now, not after the first evaluation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, merge_key: str, evaluation_key: str) -> dict[str, Any] | None:
        """The result put under these keys, or None."""
        rows = self._select("WHERE merge_key = ? AND evaluation_key = ?", (merge_key, evaluation_key))
        return rows[0].result if rows else None

    def rows(self, evaluation_key: str | None = None) -> list[Row]:
        """All evaluations, or those under `evaluation_key`, in the order they were put."""
        if evaluation_key is None:
            return self._select("", ())
        return self._select("WHERE evaluation_key = ?", (evaluation_key,))

    def put(
        self, merge_key: str, evaluation_key: str, *, merge: Mapping[str, Any], result: Mapping[str, Any]
    ) -> None:
        """Keep `result`, and `merge`, which says what was merged; nothing happens if the keys have a result.

        Raises ValueError and TypeError as `content_key` does, and SpaceError where the disk is full.
        """
        self.put_all(merge_key, {evaluation_key: result}, merge=merge)

    def put_all(
        self, merge_key: str, results: Mapping[str, Mapping[str, Any]], *, merge: Mapping[str, Any]
    ) -> None:
        """`put` of several results of one merge, by evaluation key: all of them or none, in one write."""
        about, made_at = _canonical_json(merge), datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(merge_key, key, about, _canonical_json(result), made_at) for key, result in results.items()]
        with self._writing() as connection:
            connection.executemany("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?)", rows)

    def prepare(self) -> None:
        """Make folder, file and table now: before long work, to learn whether its results can be kept."""
        with self._writing() as connection:
            # a write that changes nothing: in a folder that is read-only it fails even if the file is not
            connection.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Let go of the file; another call opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._has_table = None, False

    def _was_written(self) -> bool:
        try:
            return self.path.stat().st_size > 0  # an empty file is a database without tables
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _cannot_be_used(self.path, str(error)) from error

    def _select(self, where: str, values: tuple[str, ...]) -> list[Row]:
        if not self._was_written():
            return []
        found: list[tuple[Any, ...]] = []
        with self._transaction("DEFERRED") as connection:
            if self._has_table:
                columns = "merge_key, evaluation_key, merge, result, made_at"
                query = f"SELECT {columns} FROM evaluations {where} ORDER BY rowid"
                found = connection.execute(query, values).fetchall()
        return [_row(self.path, values) for values in found]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes, with folder, file and table made where they are missing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_be_used(self.path, str(error)) from error
        with self._transaction("IMMEDIATE") as connection:
            if not self._has_table:
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
                self._has_table = True
            yield connection

    @contextmanager
    def _transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[sqlite3.Connection]:
        """A transaction on a file that was checked to be a store; its errors are told to people.

        A writer takes its lock at once: two that read first and then both want to write cannot wait for each
        other, and SQLite would fail one without waiting.
        """
        try:
            if self._connection is None:
                # absolute, or a file called ":memory:" would be no file
                path = self.path.absolute()
                self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
                _configure(self._connection)
            self._connection.execute(f"BEGIN {kind}")
            if not self._has_table:
                self._has_table = _has_table(self._connection, self.path)
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException as error:
            self.close()  # which rolls back
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.ProgrammingError):
                raise _explained(self.path, error) from error
            raise


def _configure(connection: sqlite3.Connection) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST_ROW_BYTES)
    # as SQLite advises for files from elsewhere: no functions called by a schema, no trust in cells' sizes
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    # a journal that is rolled back, also in a file that somebody changed to the other kind (WAL): that needs
    # memory shared by all processes, which a shared file system does not give to those on other hosts
    connection.execute("PRAGMA journal_mode = DELETE")


def _has_table(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is a store; False where it is an empty database. Raises FormatError."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    schema = set(connection.execute("SELECT type, name, sql FROM sqlite_master"))
    if not (application or version or schema):
        return False
    if application == _APPLICATION_ID and version > _VERSION:
        raise FormatError(
            f"{path} is of version {version}, written by a newer PMA; this one knows versions up to "
            f"{_VERSION}: upgrade with pip install -U pma-llm, or use another file with --store FILE"
        )
    # exactly our table: a view or trigger in a hostile file would run when we read or write
    if application != _APPLICATION_ID or version != _VERSION or schema != _SCHEMA:
        raise FormatError(
            f"{path} is a database, but not a store of PMA's evaluations; use another file with --store FILE"
        )
    return True


def _explained(path: Path, error: sqlite3.DatabaseError) -> PmaError:
    # the low byte is the kind of error, the rest its details; an error of Python's own has no code
    kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return _cannot_be_used(path, str(error))
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return InputError(
            f"{path} was locked by another process for {_BUSY_SECONDS} seconds; try again when that is done, "
            "or use another file with --store FILE"
        )
    if kind == sqlite3.SQLITE_FULL:
        return SpaceError(f"{path}: no room on the disk; make room, or use another file with --store FILE")
    if kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS):
        return InputError(
            f"{path}: {error}; if its file system does not support locks, use a file on another one with "
            "--store FILE"
        )
    return _damaged(path, str(error))


def _cannot_be_used(path: Path, why: str) -> UsageError:
    return UsageError(
        f"the store of evaluations {path} cannot be opened or written ({printable(why)}); "
        "choose a file in a folder you can write to with --store FILE"
    )


def _damaged(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{path} is no store of evaluations, or damaged ({printable(why)}); use another file with "
        "--store FILE, or move this one away: what it held will be evaluated again"
    )


def _row(path: Path, columns: tuple[Any, ...]) -> Row:
    # SQLite keeps any type in any column
    if not all(isinstance(column, str) for column in columns):
        raise _damaged(path, "a column holds something other than text")
    merge_key, evaluation_key, merge, result, made_at = columns
    return Row(
        merge_key=merge_key,
        evaluation_key=evaluation_key,
        merge=_object(path, merge),
        result=_object(path, result),
        made_at=made_at,
    )


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a row is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(path, f"a row holds a JSON {type(value).__name__}, expected an object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _canonical_json(value: Any) -> str:
    """ASCII without spaces, names sorted, floats by `repr`: one text for each value."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` with dicts for all mappings. Raises ValueError for a name that is not text: JSON would make it
    text, and 1 and "1" would be one name.
    """
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"the name {name!r} is not text")
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
