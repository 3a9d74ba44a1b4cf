"""Whatever happens to a merge, nothing is overwritten and nothing looks complete that is not."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pma import engine, formats, trajectory
from pma.engine import MergeOptions
from pma.engine.building import Building
from pma.engine.staging import staging_folder
from pma.errors import IncompleteError, Interrupted, MismatchError, PmaError, SpaceError, UsageError
from pma.formats.folder_writer import FolderPart
from pma.testing import tiny_run

BIG = {"w": (6_000_000,), "v": (3_000_000,)}


def plan(paths: list[Path], **options: object) -> engine.Plan:
    return engine.plan(trajectory.from_checkpoints(paths).points, MergeOptions(**options))


def nothing_left(folder: Path) -> bool:
    return sorted(p.name for p in folder.iterdir()) == ["run"]


def test_an_existing_output_is_never_touched(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    for make in (lambda p: p.mkdir(), lambda p: p.write_text("precious"), lambda p: p.symlink_to("nowhere")):
        out = tmp_path / "out"
        make(out)
        before = out.lstat()
        with plan(paths) as planned, pytest.raises(UsageError, match="exists already"):
            engine.write(planned, out)
        assert out.lstat().st_mtime_ns == before.st_mtime_ns
        out.rmdir() if out.is_dir() and not out.is_symlink() else out.unlink()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    out = tmp_path / "out"

    def appear(read: int, written: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("old")

    with plan(paths) as planned, pytest.raises(UsageError, match=r"exists already.*100% of .* is done"):
        engine.write(planned, out, progress=appear)
    assert [p.name for p in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    out.rmdir()
    with plan(paths) as planned:  # the work is not lost
        assert engine.write(planned, out).bytes_resumed == planned.bytes_to_write
    assert engine.verify(out).findings == ()


@pytest.mark.parametrize("where", ["run/merged", "run/checkpoint-10/merged", "run/deep/er/merged"])
def test_an_output_inside_the_run_is_refused(tmp_path: Path, where: str) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned, pytest.raises(UsageError, match="inside the run"):
        engine.write(planned, tmp_path / where)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_inside_the_run_only_as_told_and_never_inside_a_checkpoint(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "run" / "merged", inside_run=True)
        with pytest.raises(UsageError, match="inside the run"):
            engine.write(planned, paths[0] / "merged", inside_run=True)
    # the merge is not taken for a checkpoint of the run
    assert [p.path for p in trajectory.discover([tmp_path / "run"]).points] == paths


@pytest.mark.parametrize("name", ["step-500-merged", "checkpoint-500", "iter_0000500"])
def test_names_that_trainers_resume_from_are_warned_about(tmp_path: Path, name: str) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        assert "trainer" in engine.write(planned, tmp_path / "merges" / name).warnings[0]


def test_no_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    paths = tiny_run(tmp_path / "run", steps=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with plan(paths) as planned, pytest.raises(SpaceError, match="1B free, the output needs"):
        engine.write(planned, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A real limit on file size in a child process: the output's files cannot be reserved."""
    tiny_run(tmp_path / "run", steps=2, shapes=BIG)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); from pma.cli import main;"
        f"sys.argv = ['pma', 'merge', {str(tmp_path / 'run')!r}, '--last', '2', '-o', "
        f"{str(tmp_path / 'out')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3
    assert "no room" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_left(tmp_path)


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tiny_run(tmp_path / "run", steps=2, shapes=BIG)

    def fail(self: FolderPart, file: str, offset_bytes: int, values: memoryview) -> None:
        raise SpaceError("writing failed: No space left on device")

    monkeypatch.setattr(FolderPart, "write", fail)
    with plan(paths) as planned, pytest.raises(SpaceError):
        engine.write(planned, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        os.utime(paths[0] / "model.safetensors", ns=(5, 5))
        with pytest.raises(MismatchError, match=r"checkpoint-10/model.safetensors was changed"):
            engine.write(planned, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_a_source_that_shrinks_or_goes_is_an_error(tmp_path: Path, how: str) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, shapes=BIG)
    with plan(paths) as planned:
        victim = paths[1] / "model.safetensors"
        os.truncate(victim, 1000) if how == "truncate" else victim.unlink()
        with pytest.raises((IncompleteError, MismatchError), match="checkpoint-20"):
            engine.write(planned, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, shapes=BIG)

    pressed = []

    def interrupt(read: int, written: int) -> None:
        if not pressed:
            pressed.append(read)
            signal.raise_signal(signal.SIGINT)  # the main thread gets it while it waits for the workers

    threads_before = threading.active_count()
    with plan(paths) as planned, pytest.raises(Interrupted):
        engine.write(planned, tmp_path / "out", progress=interrupt, save_seconds=60)  # nothing is journaled
    assert nothing_left(tmp_path)
    assert threading.active_count() == threads_before


def start_merge(run: Path, out: Path) -> subprocess.Popen[str]:
    """A merge in another process that is slow enough to be caught in the middle."""
    script = (
        "import sys, time; from pma.formats.folder_writer import FolderPart as Part; write = Part.write;"
        "Part.write = lambda *a: (write(*a), time.sleep(0.5))[0];"
        f"sys.argv = ['pma', 'merge', {str(run)!r}, '--last', '3', '-o', {str(out)!r}, '--threads', '1'];"
        "from pma.cli import main; main()"
    )
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def wait_until_written(out: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(staging_folder(out).glob("*.safetensors")):
            return
        time.sleep(0.02)
    raise AssertionError("the merge did not begin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_tidily(tmp_path: Path, number: int) -> None:
    tiny_run(tmp_path / "run", steps=3, shapes=BIG)
    process = start_merge(tmp_path / "run", tmp_path / "out")
    wait_until_written(tmp_path / "out")
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "Traceback" not in printed
    assert nothing_left(tmp_path)


def test_a_killed_merge_never_looks_complete_and_starts_again(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, shapes=BIG)
    out = tmp_path / "out"
    process = start_merge(tmp_path / "run", out)
    wait_until_written(out)
    process.kill()
    process.communicate()
    assert not out.exists()
    assert staging_folder(out).name.startswith(".")
    with plan(paths) as planned:
        engine.write(planned, out)
    assert engine.verify(out).findings == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_two_merges_into_one_output(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, shapes=BIG)
    out = tmp_path / "out"
    process = start_merge(tmp_path / "run", out)
    wait_until_written(out)
    with plan(paths) as planned, pytest.raises(UsageError, match=f"being written by process {process.pid}"):
        engine.write(planned, out)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert engine.verify(out).findings == ()


@pytest.mark.parametrize(
    "holder",
    [{"host": "elsewhere", "boot": "b"}, {"host": socket.gethostname(), "boot": "an earlier one"}, {}],
)
def test_a_lease_of_another_host_or_boot_is_only_broken_as_told(
    tmp_path: Path, holder: dict[str, str]
) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    out = tmp_path / "out"
    staging_folder(out).mkdir()
    lease = staging_folder(out) / ".pma-lease"
    lease.write_text(json.dumps({"pid": 1, **holder}))
    with plan(paths) as planned:
        with pytest.raises(UsageError, match=r"process 1 on .*last heard of .*--break-lock"):
            engine.write(planned, out)
        assert lease.exists()
        engine.write(planned, out, break_lock=True)
    assert engine.verify(out).findings == ()


def test_verify_finds_a_flipped_bit_and_names_the_tensor(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "out")
        offset = next(
            f.offset_bytes for f in planned.layout.files[0].fragments if f.tensor == "layer.0.weight"
        )
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[offset + 3] ^= 4
    path.write_bytes(data)
    found = engine.verify(tmp_path / "out")
    assert len(found.findings) == 2  # the digest, and what the sources give
    assert all("layer.0.weight" in finding and "block 0" in finding for finding in found.findings)


def test_verify_finds_what_is_cut_missing_or_changed(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2, shards=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "out")
    assert engine.verify(tmp_path / "out").findings == ()
    os.utime(paths[0] / "model-00001-of-00002.safetensors", ns=(5, 5))
    assert "has changed since" in engine.verify(tmp_path / "out").sources_changed[0]
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))
    os.truncate(first, 10)
    second.unlink()
    findings = engine.verify(tmp_path / "out").findings
    assert "10 bytes" in findings[0]
    assert "missing" in findings[1]


def test_read_only_sources_and_another_file_system(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    for path in (tmp_path / "run").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK):
        pytest.skip("/dev/shm is not writable here")
    out = shared_memory / f"pma-test-{os.getpid()}"
    try:
        with plan(paths) as planned:
            engine.write(planned, out)
        assert formats.is_checkpoint(out)
    finally:
        import shutil

        shutil.rmtree(out, ignore_errors=True)
        for path in (tmp_path / "run").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("kind", ["link", "folder", "lease and link"])
def test_a_foreign_folder_in_the_way_is_not_cleaned(tmp_path: Path, kind: str) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    hidden = staging_folder(tmp_path / "out")
    if kind == "link":
        hidden.symlink_to(precious)
    else:
        precious.rename(hidden)
        precious = hidden
    if kind == "lease and link":
        (hidden / ".pma-lease").write_text("{}")
        (hidden / "sub").symlink_to(tmp_path)
    with plan(paths) as planned, pytest.raises(UsageError, match="in the way"):
        engine.write(planned, tmp_path / "out")
    assert (precious / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_what_a_killed_merge_left_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    paths = tiny_run(tmp_path / "run", steps=2, shapes=BIG)
    with plan(paths) as planned:
        building = Building(planned, tmp_path / "out")
        building.begin()
        building.close()  # as a kill leaves it
    free = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with plan(paths) as planned:
        with pytest.raises(SpaceError):
            engine.write(planned, tmp_path / "elsewhere")  # nothing was left for this one
        engine.write(planned, tmp_path / "out")
    assert engine.verify(tmp_path / "out").findings == ()


def test_a_run_of_links_or_of_other_names_is_a_run_too(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "archive", steps=2)
    (tmp_path / "run").mkdir()
    links = [tmp_path / "run" / path.name for path in paths]
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path)
    with plan(links) as planned, pytest.raises(UsageError, match="inside the run"):
        engine.write(planned, tmp_path / "run" / "merged")
    named = [path.rename(path.parent / f"ckpt_{path.name[-2:]}") for path in paths]
    with plan(named) as planned, pytest.raises(UsageError, match="inside the run"):
        engine.write(planned, tmp_path / "archive" / "merged")


def test_links_to_blobs_as_in_a_hub_cache(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "blobs", steps=2)
    (tmp_path / "snapshot").mkdir()
    links = [tmp_path / "snapshot" / f"m{number}.safetensors" for number in (1, 2)]
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path / "model.safetensors")
    with plan(links) as planned:
        engine.write(planned, tmp_path / "out", hash_sources=True)
    found = engine.verify(tmp_path / "out")
    assert (found.sources_changed, found.findings, found.blocks_derived) == ((), (), 1)


def test_verify_looks_at_every_file(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2, shards=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    findings = engine.verify(tmp_path / "out").findings
    assert "config.json is not what was written" in findings[0]
    assert "index.json is missing" in findings[1]


def test_verify_of_a_missing_file_is_a_finding(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert "is missing" in engine.verify(tmp_path / "out").findings[0]


TAMPERED = [
    {"sources": []},
    {"sources": None},
    {"sources": [{}]},
    {"sources": [{"files": [{}]}]},
    {"outputs": []},
    {"outputs": [{"name": "../x", "size_bytes": 1, "chunk_bytes": 4 * 2**20, "blake3_chunks": ["0" * 64]}]},
    {"outputs": [{"name": "x", "size_bytes": 1, "chunk_bytes": 10**30, "blake3_chunks": ["0" * 64]}]},
    {"outputs": [{"name": "x", "size_bytes": 2**80, "chunk_bytes": 4 * 2**20, "blake3_chunks": []}]},
    {"outputs": [{"name": "x", "size_bytes": 1, "chunk_bytes": 4 * 2**20, "blake3_chunks": ["zz"]}]},
    {"small_files": [1]},
    {"small_files": [{"name": "/etc/passwd", "blake3": ""}]},
    {"dtype": "I8"},
    {"exclude": 5},
    {"pma_record": 99},
]


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_record_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "out")
    record = tmp_path / "out" / "pma.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(PmaError):
        engine.verify(tmp_path / "out")


def test_weights_edited_in_the_record_are_found(tmp_path: Path) -> None:
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "out")
    record = tmp_path / "out" / "pma.json"
    value = json.loads(record.read_text())
    value["sources"][0]["weight"], value["sources"][1]["weight"] = 0.25, 0.75
    record.write_text(json.dumps(value))
    assert "is not what the sources give" in engine.verify(tmp_path / "out").findings[0]


@pytest.mark.parametrize("lacking", ["links", "locks", "both"])
def test_file_systems_without_hard_links_or_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if lacking != "locks":
        monkeypatch.setattr(os, "link", no_links)
    if lacking != "links":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    paths = tiny_run(tmp_path / "run", steps=2)
    with plan(paths) as planned:
        engine.write(planned, tmp_path / "whole")
        out = tmp_path / "out"
        building = Building(planned, out)
        building.begin()
        os.close(building._lease._descriptor)  # as a kill leaves it
        building._lease._descriptor = -1
        building.close()
        if lacking == "links":
            engine.write(planned, out)  # the lock tells that its holder is gone
        else:
            with pytest.raises(UsageError, match=r"a file system without locks.*--break-lock"):
                engine.write(planned, out)
            engine.write(planned, out, break_lock=True)
    assert engine.verify(out).findings == ()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
