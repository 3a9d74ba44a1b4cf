"""The store: what is put comes back, several writers lose nothing, a strange file is an error for people."""

import json
import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma.errors import FormatError, InputError, UsageError
from pma.results import Store, content_key

MERGE = {"scheme": "sma", "weights": [0.5, 0.5], "sources": [{"path": "checkpoint-10", "bytes": 7}]}


def filled(path: Path, rows: int = 1) -> Path:
    with Store(path) as store:
        for number in range(rows):
            store.put(f"m{number}", "e", merge=MERGE, result={"loss": 3.0 + number, "text": "x" * 500})
    return path


def changed(path: Path, *statements: str) -> Path:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "results.sqlite"
    result = {"loss": 0.1 + 0.2, "name": "µ\x00\ud800", "cloze": None, "documents": [1, 2.0, True]}
    with Store(path) as store:
        assert store.get("m", "e") is None
        assert store.rows() == []
        assert not path.parent.parent.exists()
        store.put("m", "e", merge=MERGE, result=result)
        assert store.get("m", "e") == result
        assert store.get("m", "other") is None
    with Store(path) as store:
        assert store.get("m", "e") == result
        [row] = store.rows()
    assert (row.merge_key, row.evaluation_key, row.merge, row.result) == ("m", "e", MERGE, result)
    age = datetime.now(UTC) - datetime.fromisoformat(row.made_at)
    assert timedelta(seconds=-1) <= age < timedelta(minutes=5)
    assert [p.name for p in path.parent.iterdir()] == ["results.sqlite"]


def test_the_first_result_stays(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.put("m", "e", merge=MERGE, result={"loss": 1.0})
        store.put("m", "e", merge={}, result={"loss": 2.0})
        assert [(row.merge, row.result) for row in store.rows()] == [(MERGE, {"loss": 1.0})]


def test_several_results_of_one_merge_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    with Store(filled(tmp_path / "r.sqlite")) as store:
        store.put_all("m0", {"e": {"loss": 9.0}, "f": {"loss": 1.0}}, merge=MERGE)
        assert store.get("m0", "e") == {"loss": 3.0, "text": "x" * 500}
        assert store.get("m0", "f") == {"loss": 1.0}
        with pytest.raises(ValueError, match="JSON"):
            store.put_all("m0", {"g": {"loss": 1.0}, "h": {"loss": float("nan")}}, merge=MERGE)
        assert store.get("m0", "g") is None


def test_rows_of_one_evaluation_in_the_order_put(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        for merge_key, evaluation_key in (("z", "e"), ("y", "f"), ("a", "e")):
            store.put(merge_key, evaluation_key, merge={}, result={})
        assert [row.merge_key for row in store.rows("e")] == ["z", "a"]
        assert [row.merge_key for row in store.rows()] == ["z", "y", "a"]
        assert store.rows("g") == []


def test_a_closed_store_opens_again_and_one_open_sees_anothers_rows(tmp_path: Path) -> None:
    early = Store(tmp_path / "s")
    filled(tmp_path / "s")
    assert len(early.rows()) == 1
    early.close()
    early.close()
    early.put("m", "f", merge={}, result={})
    assert len(early.rows()) == 2
    early.close()


def test_a_file_with_a_special_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled(Path(":memory:"))
    assert (tmp_path / ":memory:").is_file()


def test_a_file_that_somebody_changed_to_wal_is_changed_back(tmp_path: Path) -> None:
    path = changed(filled(tmp_path / "s"), "PRAGMA journal_mode = WAL")
    with Store(path) as store:
        assert len(store.rows()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_put_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    store = Store(filled(tmp_path / "s"))
    with pytest.raises(KeyboardInterrupt), store._writing() as connection:
        connection.execute("DELETE FROM evaluations")
        raise KeyboardInterrupt
    assert len(store.rows()) == 1
    store.close()


def test_a_locked_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "s")
    monkeypatch.setattr("pma.results.store._BUSY_SECONDS", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match="locked by another process"):
        Store(path)
    other.close()
    with Store(path) as store:
        assert len(store.rows()) == 1


PUT_MANY = """
import sys
from pathlib import Path
from pma.results import Store
path, first = Path(sys.argv[1]), int(sys.argv[2])
with Store(path) as store:
    for number in range(first, first + 25):
        store.put(f"m{number}", "e", merge={"number": number}, result={"writer": first})
"""


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    path, firsts = tmp_path / "results.sqlite", (0, 10, 20, 30)
    writers = [subprocess.Popen([sys.executable, "-c", PUT_MANY, str(path), str(first)]) for first in firsts]
    assert [writer.wait(100) for writer in writers] == [0] * 4
    with Store(path) as store:
        rows = store.rows()
    assert sorted(row.merge["number"] for row in rows) == list(range(55))
    for row in rows:
        assert row.merge_key == f"m{row.merge['number']}"
        assert row.result["writer"] <= row.merge["number"] < row.result["writer"] + 25


@pytest.mark.parametrize("content", [b"loss,scheme\n3.0,sma\n", b"\x00" * 5000, b"SQLite format 3\x00" * 50])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"notes\.txt .*--store FILE"):
        Store(path)
    assert path.read_bytes() == content


def test_an_empty_file_is_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    with Store(tmp_path / "s") as store:
        assert store.rows() == []
        store.prepare()
        assert store.rows() == []
    assert (tmp_path / "s").stat().st_size > 0


def test_a_newer_version(tmp_path: Path) -> None:
    path = changed(filled(tmp_path / "s"), "PRAGMA user_version = 2", "ALTER TABLE evaluations ADD extra")
    with pytest.raises(FormatError, match=r"version 2, written by a newer PMA.*up to 1.*pip install -U"):
        Store(path)


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA application_id = 1",
        "PRAGMA user_version = 0",
        "DROP TABLE evaluations",
        "CREATE TRIGGER t AFTER INSERT ON evaluations BEGIN DELETE FROM evaluations; END",
        "CREATE VIEW v AS SELECT 1",
    ],
)
def test_anothers_database(tmp_path: Path, statement: str) -> None:
    path = changed(filled(tmp_path / "s"), statement)
    with pytest.raises(FormatError, match=r"not a store of PMA's evaluations.*--store FILE"):
        Store(path)


@pytest.mark.parametrize("kept", [2, 50, 100, 1000, 4096, 0.5])
def test_a_truncated_file(tmp_path: Path, kept: float) -> None:
    path = filled(tmp_path / "s", rows=30)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(FormatError, match="--store FILE"):
        Store(path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("'{'", "not valid JSON"),
        ("'[1]'", "JSON list"),
        ("'{\"loss\": NaN}'", "not a finite number"),
        ("'{\"loss\": 1e999}'", "not a finite number"),
        (f"'{'[' * 100_000}'", "not valid JSON"),
        ("x'80'", "other than text"),
        ("CAST(x'80' AS TEXT)", "decode"),
    ],
)
def test_a_hostile_row(tmp_path: Path, value: str, told: str) -> None:
    path = changed(filled(tmp_path / "s"), f"UPDATE evaluations SET result = {value}")
    with Store(path) as store, pytest.raises(FormatError, match=told):
        store.get("m0", "e")


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "results.sqlite")
    assert store.rows() == []
    with pytest.raises(UsageError, match="--store FILE"):
        store.put("m", "e", merge={}, result={})
    with pytest.raises(UsageError, match="--store FILE"):
        Store(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_can_be_read_and_not_written(tmp_path: Path) -> None:
    path = filled(tmp_path / "s")
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with Store(path) as store:
            assert len(store.rows()) == 1
            with pytest.raises(UsageError, match="--store FILE"):
                store.put("m", "f", merge={}, result={})
            with pytest.raises(UsageError, match="--store FILE"):
                store.prepare()
            path.chmod(0o644)  # the folder alone: no journal can be made
            with pytest.raises(UsageError, match="--store FILE"):
                store.prepare()
        with Store(tmp_path / "new") as store, pytest.raises(UsageError, match="--store FILE"):
            store.prepare()
        with Store(tmp_path / "folder" / "new") as store, pytest.raises(UsageError, match="--store FILE"):
            store.prepare()
    finally:
        tmp_path.chmod(0o755)


def test_numbers_that_are_not_are_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            content_key({"loss": [value]})
    with Store(tmp_path / "s") as store, pytest.raises(ValueError, match="not JSON compliant"):
        store.put("m", "e", merge={}, result={"loss": float("nan")})
    assert not (tmp_path / "s").exists()


def test_a_key_is_pinned_and_tells_types_apart() -> None:
    assert content_key({"b": [1, 2.5], "a": None}) == PINNED
    alike = [1, 1.0, True, "1", "true", None, "null", 0, 0.0, -0.0, False, [], {}, [[]], [1], {"1": 1}, ""]
    assert len({content_key(value) for value in alike}) == len(alike)
    assert content_key((1, (2,))) == content_key([1, [2]])
    with pytest.raises(ValueError, match="the name 1 is not text"):
        content_key([{1: 2}])
    with pytest.raises(TypeError):
        content_key(object())


PINNED = "2ed701deb13b63ce5b0e83e661dfd6a35bdba5e180cff2a1eefba5960570a3e2"
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def shuffled(value: Any) -> Any:
    """`value` with every dict in the opposite order."""
    if isinstance(value, dict):
        return {name: shuffled(item) for name, item in reversed(value.items())}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(value=VALUES)
def test_a_key_does_not_depend_on_order(value: Any) -> None:
    assert content_key(value) == content_key(shuffled(value)) == content_key(json.loads(json.dumps(value)))


@given(value=st.dictionaries(st.text(), VALUES, min_size=1), data=st.data())
def test_a_key_depends_on_every_value_and_name(value: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(value)))
    other = data.draw(
        VALUES.filter(lambda v: json.dumps(v, sort_keys=True) != json.dumps(value[name], sort_keys=True))
    )
    rest = {n: item for n, item in value.items() if n != name}
    keys = {content_key(value), content_key({**value, name: other}), content_key(rest)}
    assert len(keys) == 3
