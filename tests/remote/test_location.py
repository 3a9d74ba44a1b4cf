"""Places written as paths or URLs, and what a RemotePath does of what a Path does."""

import os
from pathlib import Path
from typing import Any

import pytest

from pma.errors import MissingExtra, UsageError
from pma.remote import RemotePath, location, redacted
from pma.remote.location import credentials_in


@pytest.mark.parametrize("text", ["runs/7b", "/runs/7b", "a:b/c", "C:/runs", "s3:/bucket/run", "../x"])
def test_anything_but_a_url_is_a_path(text: str) -> None:
    assert location(text) == Path(text)


def test_file_urls_are_paths_of_this_machine() -> None:
    assert location("file:///runs/7%20b") == Path("/runs/7 b")
    assert location("file://localhost/runs") == Path("/runs")


@pytest.mark.parametrize("text", ["s3://", "s3:///", "s3://bucket/../other", "s3://bucket/a\x1b[2J"])
def test_urls_that_name_no_place_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        location(text)


def test_names_of_a_url() -> None:
    path = location("s3://bucket/runs/7b/")
    assert (str(path), path.name, path.suffix) == ("s3://bucket/runs/7b", "7b", "")
    assert (
        str(path / "checkpoint-5" / "model.safetensors")
        == "s3://bucket/runs/7b/checkpoint-5/model.safetensors"
    )
    assert [str(parent) for parent in path.parents] == ["s3://bucket/runs", "s3://bucket"]
    assert path == location("s3://bucket/runs/7b")
    assert len({path, location("s3://bucket/runs/7b/")}) == 1
    assert path < path / "checkpoint-5"


def test_a_url_is_never_taken_for_a_file_of_this_machine() -> None:
    path = location("memory://run")
    assert not isinstance(path, Path)
    with pytest.raises(TypeError, match="not a file of this machine"):
        os.stat(path)
    with pytest.raises(TypeError):
        open(path).close()
    with pytest.raises(AttributeError):
        path.unlink()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://user:pass@bucket/x", "s3://bucket/x"),
        ("ftp://user@host/x", "ftp://user@host/x"),
        ("hf://org/model@main/x", "hf://org/model@main/x"),
        ("see https://u:p@h/x?sig=1&a=2, or gs://b/y?z", "see https://h/x or gs://b/y"),
    ],
)
def test_credentials_are_left_out_of_text(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_credentials_in_a_url() -> None:
    assert credentials_in("https://user:pass@host/x?sig=12") == ["user:pass", "sig=12", "pass"]
    assert credentials_in("hf://org/model@main/x") == []


def test_a_query_goes_along_with_every_request() -> None:
    path = location("https://host/runs/7b?sig=1") / "config.json"
    assert isinstance(path, RemotePath)
    assert (path.place, str(path)) == ("host/runs/7b/config.json?sig=1", "https://host/runs/7b/config.json")


def test_what_is_there(memory: Any) -> None:
    memory.pipe_file("/run/checkpoint-1/model.bin", b"12345")
    memory.pipe_file("/run/checkpoint-1/zero/part.bin", b"1")
    memory.pipe_file("/run/notes.txt", b"notes")
    run = location("memory://run")
    assert run.is_dir()
    assert [path.name for path in run.iterdir()] == ["checkpoint-1", "notes.txt"]
    checkpoint = run / "checkpoint-1"
    assert (checkpoint.is_dir(), checkpoint.is_file(), checkpoint.exists()) == (True, False, True)
    assert [path.name for path in checkpoint.glob("*.bin")] == ["model.bin"]
    assert [path.name for path in run.rglob("*.bin")] == ["model.bin", "part.bin"]
    [part] = run.glob("checkpoint-*/zero/*.bin")
    assert part.relative_to(run).as_posix() == "checkpoint-1/zero/part.bin"
    assert run / "" == run
    assert (checkpoint / "model.bin").stat().st_size == 5
    assert (run / "notes.txt").read_text() == "notes"
    lone = location("memory://run/checkpoint-1/model.bin")
    assert (lone.is_file(), lone.is_dir(), lone.read_bytes()) == (True, False, b"12345")
    for missing in (run / "no", run / "no" / "such", location("memory://nowhere")):
        assert (missing.exists(), missing.is_dir(), missing.is_file()) == (False, False, False)
        with pytest.raises(FileNotFoundError):
            missing.read_bytes()


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'pma-llm\[remote\]'"):
        location("s3://bucket/run").exists()
    with pytest.raises(UsageError, match="Install s3fs"):
        location("strange://bucket/run").exists()
