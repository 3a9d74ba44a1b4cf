"""Local task files: shapes, limits, and every way in which a file can be wrong."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from pma.errors import FormatError, InputError, PmaError, UsageError
from pma.evaluation.tasks.files import LocalTask, is_path, read_tasks

from . import task_files

CHOICE = {"context": "c", "choices": ["a", "b"], "gold": 1}


def read(path: Path, limit: int | None = None) -> LocalTask:
    [task], _ = read_tasks([path], limit)
    return task


def test_every_shape_of_a_folder_and_what_is_left_out(tmp_path: Path) -> None:
    tasks, left_out = read_tasks([task_files.write_all(tmp_path)])
    found = {task.name: task for task in tasks}
    assert {name: (task.kind, task.delimiter) for name, task in found.items()} == {
        "arc": ("choices", " "),
        "choices": ("choices", " "),
        "pairs": ("choices", " "),
        "targets": ("target", " "),
    }
    assert found["pairs"].items[0] == {
        "context": "",
        "choices": ["The cat 0 sleeps.", "The cat sleep 0."],
        "gold": 0,
    }
    assert found["arc"].items[1] == {
        "context": "Question: What is 1?\nAnswer:",
        "choices": ["a", "bb"],
        "gold": 1,
    }
    assert [path.name for path, _ in left_out] == ["generation.jsonl"]


def test_a_packed_file_is_the_same_task(tmp_path: Path) -> None:
    plain = task_files.write_jsonl(tmp_path / "pairs.jsonl", task_files.PAIRS)
    packed = tmp_path / "packed" / "pairs.jsonl.xz"
    packed.parent.mkdir()
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert read(packed) == read(plain)
    assert read(packed).digest == read(plain).digest


def test_a_limit_is_spread_over_the_file_and_changes_the_digest(tmp_path: Path) -> None:
    path = task_files.write_jsonl(tmp_path / "c.jsonl", task_files.CHOICES)
    some = read(path, 3)
    assert [item["context"] for item in some.items] == [task_files.CHOICES[i]["context"] for i in (0, 3, 6)]
    assert some.digest != read(path).digest
    assert read(path, 100).digest == read(path).digest


def test_white_space_that_the_file_has_is_not_doubled(tmp_path: Path) -> None:
    joined = [{"context": "a ", "target": "b"}, {"context": "a", "target": "\nb"}]
    assert read(task_files.write_jsonl(tmp_path / "joined.jsonl", joined)).delimiter == ""
    mixed = [*joined, {"context": "a", "target": "b"}]
    assert read(task_files.write_jsonl(tmp_path / "mixed.jsonl", mixed)).delimiter == " "


def test_names_are_made_harmless(tmp_path: Path) -> None:
    path = task_files.write_jsonl(tmp_path / "a=b,{{c}} d.jsonl", task_files.PAIRS)
    assert read(path).name == "a_b_c_d"


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evals").mkdir()
    assert [is_path(s) for s in ("blimp", "blimp.jsonl", "x.jsonl.xz", "a/b", "evals")] == [False] + [
        True
    ] * 4


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**CHOICE, "gold": 2}, "gold is 2, expected a whole number from 0 to 1"),
        ({**CHOICE, "gold": -1}, "gold is -1"),
        ({**CHOICE, "gold": True}, "gold is True"),
        ({**CHOICE, "gold": "1"}, "gold is '1'"),
        ({**CHOICE, "choices": ["a"]}, "at least two"),
        ({**CHOICE, "choices": "ab"}, "at least two"),
        ({**CHOICE, "choices": ["a", " "]}, "a choice is empty"),
        ({**CHOICE, "choices": ["a", 2]}, "a choice is a JSON int"),
        ({**CHOICE, "context": None}, "context is a JSON NoneType"),
        ({**CHOICE, "context": "\ud800"}, "half a surrogate pair"),
        ({"context": "c", "choices": ["a", "b"]}, "has no 'gold'"),
        ([], "a JSON list, expected an object"),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, row: Any, words: str) -> None:
    path = task_files.write_jsonl(tmp_path / "wrong.jsonl", [CHOICE, CHOICE])
    with path.open("a") as file:
        file.write("\n" + json.dumps(row) + "\n")
    with pytest.raises(FormatError, match="line 4") as error:
        read(path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "c", "target": "  "}, "target is empty"),
        ({"context": "c", "target": 5}, "target is a JSON int"),
        ({"good": "a", "bad": 1}, "a choice is a JSON int"),
        ({"question": "q", "choices": {"text": ["a", "b"]}, "answerKey": "A"}, "of equal lengths"),
        ({"question": "q", "choices": ["a", "b"], "answerKey": "A"}, "of equal lengths"),
        (
            {"question": 1, "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
            "question is a JSON int",
        ),
        (
            {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "none of choices.label",
        ),
    ],
)
def test_first_lines_that_are_wrong(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(FormatError) as error:
        read(task_files.write_jsonl(tmp_path / "wrong.jsonl", [row]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("a.jsonl", b"{", FormatError, "not valid JSON"),
        ("a.jsonl", b"[" * 100_000, FormatError, "not valid JSON"),
        ("a.jsonl", b"\xff", FormatError, "not UTF-8"),
        ("a.jsonl.xz", b"plain", FormatError, r"not UTF-8 text in \.xz"),
        ("a.jsonl", b"", FormatError, "0 items"),
        ("a.jsonl", json.dumps(CHOICE).encode(), FormatError, "1 items"),
        ("a.jsonl", b'{"prompt": "x"}', FormatError, "no task that is known"),
    ],
)
def test_files_that_are_wrong(
    tmp_path: Path, name: str, content: bytes, kind: type[PmaError], words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=words):
        read(tmp_path / name)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="holds no task"):
        read(tmp_path)


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    paths = [task_files.write_jsonl(tmp_path / f / "same.jsonl", task_files.PAIRS) for f in "ab"]
    with pytest.raises(UsageError, match="two tasks named same"):
        read_tasks(paths)
