"""One server for all tests here; every test has a bucket of its own."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

fsspec = pytest.importorskip("fsspec", reason="stores are read through fsspec")

if TYPE_CHECKING:
    from .s3 import S3Server

SECRET = "a-secret-that-nobody-prints"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def started_server() -> Iterator["S3Server"]:
    pytest.importorskip("moto.server", reason="needs moto[server]: pip install 'pma-llm[dev]'")
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'pma-llm[dev]'")
    from .s3 import S3Server

    server = S3Server()
    yield server
    server.stop()


@dataclass
class Bucket:
    """A bucket of the server. `driver` is fsspec's own, to look at things without the code under test."""

    server: "S3Server"
    name: str
    driver: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def put(self, folder: Path, to: str) -> str:
        """Copy a local folder into the bucket; returns its URL."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.driver.pipe_file(f"{self.name}/{to}/{file.relative_to(folder)}", file.read_bytes())
        return f"{self.url}/{to}"

    def files(self, folder: str) -> dict[str, bytes]:
        """Everything below a folder of the bucket, by relative name."""
        self.driver.invalidate_cache()
        start = f"{self.name}/{folder}/"
        found = self.driver.find(start)
        return {name.removeprefix(start): self.driver.cat_file(name) for name in found}


@pytest.fixture
def bucket(started_server: "S3Server", monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": started_server.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # then it is our attempts that faults meet, not those of the driver
        "AWS_MAX_ATTEMPTS": "1",
        "TMPDIR": str(tmp_path / "staging"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "staging").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    # waiting is tested by itself
    monkeypatch.setattr("pma.remote.retrying._FIRST_WAIT_SECONDS", 0.02)
    started_server.behave()
    made = Bucket(started_server, f"bucket-{next(_numbers)}", fsspec.filesystem("s3"))
    made.driver.mkdir(made.name)
    started_server.behave()
    return made


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's store in memory, empty."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield fsspec.filesystem("memory")
    # what an interrupted merge left underway would arrive in the next test's store
    for thread in threading.enumerate():
        if thread.name.startswith("pma-send"):
            thread.join()
    MemoryFileSystem.store.clear()
