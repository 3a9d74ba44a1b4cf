"""The commands against a real S3 server: to the bit as on local files, also where it is busy, slow and cuts
connections.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner, Result

from pma.cli import app
from pma.remote import RemotePath, location
from pma.testing import tiny_run

from .conftest import SECRET, Bucket

SHAPES = {"embed.weight": (300, 1000), "layer.weight": (1000, 700), "layer.bias": (700,), "scale": ()}


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def right(result: Result) -> Result:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def weights(folder: Path) -> dict[str, bytes]:
    """What a merge consists of, but for the record with its paths and times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "pma.json"}


def sent(bucket: Bucket, folder: str) -> dict[str, bytes]:
    return {name: data for name, data in bucket.files(folder).items() if name != "pma.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on this machine, and one merge of it to compare with."""
    folder = tmp_path_factory.mktemp("local")
    tiny_run(folder / "run", steps=6, shards=3, shapes=SHAPES)
    right(pma("merge", folder / "run", "--last", 5, "--scheme", "wma", "-o", folder / "merged"))
    return folder / "run"


def test_inspect_and_plan_say_the_same(run: Path, bucket: Bucket) -> None:
    url = bucket.put(run, "run")
    for arguments in (["inspect", "{}"], ["inspect", "{}/checkpoint-30"], ["plan", "{}", "--last", "4"]):
        local, remote = (
            json.loads(right(pma(*(a.format(where) for a in arguments), "--json")).stdout)
            for where in (run, url)
        )
        remote = json.loads(json.dumps(remote).replace(url, str(run)))
        if "peak_memory_bytes" in local:  # with what is read ahead
            assert remote.pop("peak_memory_bytes") > local.pop("peak_memory_bytes")
        assert remote == local


def test_opening_reads_headers_only(run: Path, bucket: Bucket) -> None:
    url = bucket.put(run, "run")
    bucket.server.served.clear()
    right(pma("plan", url, "--last", 5))
    shards = [size for method, path, size in bucket.server.served if path.endswith(".safetensors")]
    assert len(shards) == (5 + 1) * 3  # the newest once more, for the suggestion
    assert max(shards) <= 2**15
    assert sum(file.stat().st_size for file in run.rglob("*.safetensors")) > 100 * 2**15


def test_a_run_is_listed_by_folders_not_file_by_file(run: Path, bucket: Bucket) -> None:
    url = bucket.put(run, "run")
    bucket.server.served.clear()
    right(pma("inspect", url))
    assert [path for method, path, _ in bucket.server.served if method == "HEAD"] == []
    listings = [path for method, path, _ in bucket.server.served if path.rstrip("/") == f"/{bucket.name}"]
    # the run, each checkpoint; and the newest again as it is opened
    assert len(listings) <= 1 + 6 + 2


@pytest.mark.parametrize("faulty", [False, True])
def test_merge_and_verify(run: Path, bucket: Bucket, faulty: bool, tmp_path: Path) -> None:
    url = bucket.put(run, "run")
    if faulty:
        bucket.server.busy, bucket.server.cut, bucket.server.late = 0.06, 0.04, 0.1
    # from a store to a store; from a store to here; from here to a store
    right(pma("merge", url, "--last", 5, "--scheme", "wma", "-o", f"{bucket.url}/out/merged"))
    right(pma("merge", url, "--last", 5, "--scheme", "wma", "-o", tmp_path / "out"))
    right(pma("merge", run, "--last", 5, "--scheme", "wma", "-o", f"{bucket.url}/out/from-here"))
    expected = weights(run.parent / "merged")
    assert (
        sent(bucket, "out/merged") == sent(bucket, "out/from-here") == weights(tmp_path / "out") == expected
    )
    for out in (f"{bucket.url}/out/merged", tmp_path / "out", f"{bucket.url}/out/from-here"):
        value = json.loads(right(pma("verify", out, "--full", "--json")).stdout)
        assert (value["findings"], value["sources_changed"]) == ([], [])
        assert value["blocks_derived"] == value["blocks_total"] > 0
    shown = right(pma("inspect", f"{bucket.url}/out/merged")).stdout
    assert "wma of 5 checkpoints, steps 20 to 60" in shown
    assert not list((tmp_path / "staging").rglob("*.safetensors"))


def test_the_record_is_sent_last(run: Path, bucket: Bucket) -> None:
    right(pma("merge", run, "--last", 2, "-o", f"{bucket.url}/merged"))
    puts = [path.rsplit("/", 1)[-1] for method, path, _ in bucket.server.served if method in ("PUT", "POST")]
    assert puts[0] == ".pma-unfinished"
    assert puts[-2:] == ["model.safetensors.index.json", "pma.json"]
    assert ".pma-unfinished" not in bucket.files("merged")


def test_sweep(run: Path, bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put(run, "run")
    grid = ("--last", "2,3", "--scheme", "sma,wma")
    value = json.loads(right(pma("sweep", url, *grid, "--write", f"{bucket.url}/swept", "--json")).stdout)
    right(pma("sweep", run, *grid, "--write", tmp_path / "swept"))
    names = {path.name for path in (tmp_path / "swept").iterdir()}
    assert {entry["path"].rsplit("/", 1)[-1] for entry in value["written"]} == names
    for name in names:
        assert sent(bucket, f"swept/{name}") == weights(tmp_path / "swept" / name)
    again = json.loads(right(pma("sweep", url, *grid, "--write", f"{bucket.url}/swept", "--json")).stdout)
    assert again["writing_passes"] == 0


def test_an_output_that_is_there_is_not_touched(run: Path, bucket: Bucket) -> None:
    bucket.driver.pipe_file(f"{bucket.name}/mine/notes.txt", b"mine")
    failed = pma("merge", run, "--last", 2, "-o", f"{bucket.url}/mine")
    assert failed.exit_code == 2
    assert "exists already and is not touched" in failed.stderr
    right(pma("merge", run, "--last", 2, "-o", f"{bucket.url}/merged"))
    before = bucket.files("merged")
    for more in ((), ("--fresh",)):
        failed = pma("merge", run, "--last", 2, "-o", f"{bucket.url}/merged", *more)
        assert (failed.exit_code, bucket.files("merged")) == (2, before)
    assert bucket.files("mine") == {"notes.txt": b"mine"}


def test_an_output_inside_the_run_is_refused(run: Path, bucket: Bucket) -> None:
    url = bucket.put(run, "run")
    failed = pma("merge", url, "--last", 2, "-o", f"{url}/merged")
    assert "lies inside the run" in failed.stderr
    right(pma("merge", url, "--last", 2, "-o", f"{url}/merged", "--inside-run"))


def test_a_source_that_changes_meanwhile_is_found_out(run: Path, bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put(run, "run")
    changed = f"{bucket.name}/run/checkpoint-60/model-00001-of-00003.safetensors"
    reads = 0

    def before(method: str, path: str) -> None:
        nonlocal reads
        reads += path.endswith(".safetensors")
        if reads == 3 * 3 + 2 and method == "GET":  # headers, then this
            bucket.server.before = lambda method, path: None
            data = bytearray((run / "checkpoint-60" / "model-00001-of-00003.safetensors").read_bytes())
            data[-1] ^= 1
            bucket.driver.pipe_file(changed, bytes(data))

    bucket.server.before = before
    failed = pma("merge", url, "--last", 3, "-o", tmp_path / "out")
    assert failed.exit_code == 3
    assert "was changed while it was merged" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_shrinks_is_an_error_at_once(run: Path, bucket: Bucket) -> None:
    from pma.errors import IncompleteError
    from pma.formats import open_checkpoint
    from pma.formats.contracts import requests_for
    from pma.remote import location

    reader = open_checkpoint(location(bucket.put(run, "run") + "/checkpoint-60"))
    name = next(iter(reader.tensors))
    [fragment] = reader.fragments(name)
    bucket.driver.pipe_file(f"{bucket.name}/run/checkpoint-60/{fragment.file}", b"short")
    count = reader.tensors[name].element_count
    with pytest.raises(IncompleteError, match="ends at byte 5"):
        reader.read_many(requests_for(reader.runs(name, 0, count), 2, memoryview(bytearray(2 * count))))


def test_what_is_missing_is_said(bucket: Bucket) -> None:
    for url in (f"{bucket.url}/nothing", "s3://no-such-bucket/run"):
        failed = pma("inspect", url)
        assert (failed.exit_code, "does not exist" in failed.stderr) == (3, True), failed.stderr


KILL = """
import sys
from pma.cli import app
app(sys.argv[1:])
"""


def test_killed_while_sending_goes_on(run: Path, bucket: Bucket, tmp_path: Path) -> None:
    command = ["merge", run, "--last", 5, "--scheme", "wma", "-o", f"{bucket.url}/merged"]
    killed: list[subprocess.Popen[bytes]] = []

    def before(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("00002-of-00003.safetensors"):
            while not any(
                there.endswith("00001-of-00003.safetensors") for _, there, _ in bucket.server.served
            ):
                time.sleep(0.01)
            killed[0].send_signal(signal.SIGKILL)
            killed[0].wait()
            raise ConnectionResetError("whoever sent this is dead")
        if method == "PUT" and path.endswith("00003-of-00003.safetensors"):
            raise ConnectionResetError("not yet")

    bucket.server.before = before
    killed.append(subprocess.Popen([sys.executable, "-c", KILL, *map(str, command)], stderr=subprocess.PIPE))
    killed[0].communicate(timeout=50)
    assert killed[0].returncode == -signal.SIGKILL
    left = bucket.files("merged")
    assert "pma.json" not in left
    # a reader takes it for what it is, and so does another merge
    assert "still being sent" in pma("merge", f"{bucket.url}/merged", run / "checkpoint-60", "-o", "x").stderr
    other = pma("merge", run, "--last", 2, "-o", f"{bucket.url}/merged")
    assert other.exit_code == 2
    assert "its sources or options were not the same" in other.stderr
    bucket.server.behave()
    value = json.loads(right(pma(*command, "--json")).stdout)
    assert value["bytes_resumed"] > 0
    assert sent(bucket, "merged") == weights(run.parent / "merged")


def test_what_arrived_is_not_sent_again(run: Path, bucket: Bucket) -> None:
    command = ["merge", run, "--last", 5, "--scheme", "wma", "-o", f"{bucket.url}/merged"]

    def before(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("index.json"):
            os.kill(os.getpid(), signal.SIGINT)
            bucket.server.before = lambda method, path: None

    bucket.server.before = before
    failed = pma(*command)
    assert failed.exit_code == 4, (failed.stderr, failed.exception)
    assert "the same command goes on" in failed.stderr
    bucket.server.behave()
    right(pma(*command))
    puts = [path for method, path, _ in bucket.server.served if method == "PUT"]
    assert not [path for path in puts if path.endswith(".safetensors")]
    assert sent(bucket, "merged") == weights(run.parent / "merged")


def test_credentials_are_never_shown(run: Path, bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put(run, "run")
    told = []
    secret_url = url.replace("s3://", "s3://user:a-password@") + "?X-Amz-Signature=a-signature"
    told.append(pma("merge", url, "--last", 2, "-o", f"{bucket.url}/merged", "--json"))
    told.append(pma("inspect", secret_url))
    told.append(pma("merge", run, "--last", 2, "-o", secret_url))
    told.append(pma("inspect", "https://user:a-password@127.0.0.1:9/run?sig=a-signature"))
    told.append(pma("inspect", "nothing://user:a-password@host/run?sig=a-signature"))
    text = "".join(result.stdout + result.stderr for result in told)
    text += bucket.files("merged")["pma.json"].decode()
    for secret in (SECRET, "an-access-key", "a-password", "a-signature"):
        assert secret not in text
    assert [result.exit_code for result in told] == [0, 3, 3, 3, 2]


def test_a_listing_that_another_thread_asked_for_before_a_change_is_not_remembered(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = location(f"{bucket.url}/out")
    assert isinstance(folder, RemotePath)
    bucket.driver.pipe_file(f"{bucket.name}/out/file", b"1")
    driver = folder.store._driver
    ask, changed = driver.ls, Event()

    def slow(*where: Any, **how: Any) -> Any:
        answer = ask(*where, **how)
        changed.wait(10)
        return answer

    monkeypatch.setattr(driver, "ls", slow)
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(folder.store.listing, folder.place)
        time.sleep(0.5)
        bucket.driver.pipe_file(f"{bucket.name}/out/file", b"22")
        folder.store.forget(folder.place)
        changed.set()
        assert before.result()["file"].size_bytes == 1
    assert folder.store.listing(folder.place)["file"].size_bytes == 2


def test_what_arrived_is_not_what_another_thread_listed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listing is of before, and comes just before we look."""
    path = location(f"{bucket.url}/out/file")
    assert isinstance(path, RemotePath)
    driver, other = path.store._driver, fsspec.filesystem("s3", skip_instance_cache=True)
    forget = driver.invalidate_cache

    def lists(*where: Any) -> None:
        forget(*where)
        other.pipe_file(f"{bucket.name}/out/file", b"1")
        assert driver.ls(f"{bucket.name}/out", detail=True)[0]["size"] == 1
        other.pipe_file(f"{bucket.name}/out/file", b"22")

    monkeypatch.setattr(driver, "invalidate_cache", lists)
    found = path.store.entry(path.place)
    assert found is not None
    assert found.size_bytes == 2
