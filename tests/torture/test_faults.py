"""Storage that fails, fills up or changes under a merge, signals, and odd shapes: each ends tidily, says what
is kept, and the same command goes on.
"""

# in tests/engine already: a flipped bit and a cut file found by verify; a source that is truncated, deleted
# or touched before it is merged; no room found before writing; signals before the first save; another file
# system; read-only sources; tensors of no dimension or no element

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from pma import engine, trajectory
from pma.engine import MergeOptions, blocks, building, provenance
from pma.engine.staging import staging_folder
from pma.errors import InputError, MismatchError, PmaError, SpaceError, StorageError, UsageError
from pma.formats.folder_writer import FolderPart
from pma.formats.safetensors import SafetensorsReader
from pma.testing import reference_average, tiny_run
from pma.testing.reference import same_bytes

from .calls import Calls
from .checks import check_complete, check_finished, weights_of

MIB = 2**20
SHAPES = {"a": (5_000_000,), "b": (3_000_001,), "c": (1_000_003,)}  # five chunks of bf16


def plan(paths: list[Path], **options: object) -> engine.Plan:
    return engine.plan(trajectory.from_checkpoints(paths).points, MergeOptions(**options))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_run(tmp_path_factory.mktemp("faults") / "run", steps=3, shapes=SHAPES)


@pytest.fixture(scope="module")
def expected(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    with plan(sources) as planned:
        engine.write(planned, out)
    return weights_of(out)


@pytest.fixture
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block wrote is in the journal soon, though the whole merge takes no time."""
    write = FolderPart.write

    def slow(part: FolderPart, file: str, offset_bytes: int, values: memoryview) -> None:
        write(part, file, offset_bytes, values)
        time.sleep(0.02)

    monkeypatch.setattr(FolderPart, "write", slow)


def check_resumes(sources: list[Path], out: Path, expected: dict[str, str]) -> None:
    assert check_complete(out.parent, {out: expected}) == []
    with plan(sources) as planned:
        done = engine.write(planned, out)
    assert 0 < done.bytes_resumed < done.bytes_written + done.bytes_resumed
    check_finished(out, expected)
    assert [path for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={22 * MIB}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    if subprocess.run(["umount", str(folder)]).returncode:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        pytest.fail("a file was left open")


def fill(disk: Path) -> None:
    """Another program takes what room there is."""
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for bytes_at_once in (MIB, 4096):
            with pytest.raises(OSError, match="No space left"):
                while True:
                    os.write(descriptor, bytes(bytes_at_once))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("reserves", [True, False], ids=["room was reserved", "no room was reserved"])
@pytest.mark.usefixtures("saved_at_once")
def test_a_disk_that_fills_up_in_the_middle(
    small_disk: Path,
    sources: list[Path],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    reserves: bool,
) -> None:
    def unsupported(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    written = []

    def progress(read: int, more: int) -> None:
        written.append(more)
        if sum(written) > 8 * MIB and not (small_disk / "filler").exists():
            fill(small_disk)

    if not reserves:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    out = small_disk / "out"
    with (
        plan(sources, threads=1) as planned,
        pytest.raises(SpaceError, match=r"No space left.*is done and kept"),
    ):
        engine.write(planned, out, save_seconds=0.005, progress=progress)
    assert not out.exists()
    with plan(sources) as planned, pytest.raises(SpaceError):  # still no room: what is kept stays
        engine.write(planned, out)
    (small_disk / "filler").unlink()
    if reserves:  # everything may have been written, with no room for the record beside it
        with plan(sources) as planned:
            assert engine.write(planned, out).bytes_resumed > 0
        check_finished(out, expected)
    else:
        check_resumes(sources, out, expected)


class Failing:
    """Stands in for a function of `os`; fails once, at a call for which `chosen` is true."""

    def __init__(self, name: str, number: int, chosen: Callable[[int, int], bool]) -> None:
        self._real, self._number, self._chosen = getattr(os, name), number, chosen
        self._calls = count(1)
        self.failed = False

    def __call__(self, descriptor: int, *arguments: object) -> object:
        if not self.failed and self._chosen(descriptor, next(self._calls)):
            self.failed = True
            raise OSError(self._number, os.strerror(self._number))
        return self._real(descriptor, *arguments)


def opened(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


FAULTS = {
    # one source on bad storage, late in its file
    "read": (
        "preadv",
        errno.EIO,
        lambda d, n: "checkpoint-20" in opened(d) and n > 74,
        "checkpoint-20.*reading",
    ),
    "write": (
        "pwrite",
        errno.EIO,
        lambda d, n: opened(d).endswith(".safetensors") and n > 30,
        "writing failed",
    ),
    "sync": ("fdatasync", errno.EIO, lambda d, n: n > 2, "writing failed"),
    "journal": ("pwrite", errno.ENOSPC, lambda d, n: opened(d).endswith("journal") and n > 30, "No space"),
    "quota": ("pwrite", errno.EDQUOT, lambda d, n: opened(d).endswith(".safetensors") and n > 30, "quota"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("saved_at_once")
def test_a_fault_in_the_middle(
    tmp_path: Path, sources: list[Path], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, number, chosen, message = FAULTS[fault]
    failing = Failing(name, number, chosen)
    kind = StorageError if number == errno.EIO else SpaceError
    out = tmp_path / "out"
    with monkeypatch.context() as patched, plan(sources, threads=1) as planned:
        patched.setattr(SafetensorsReader, "descriptor", lambda *_: None)  # so that Python reads
        patched.setattr(os, name, failing)
        with pytest.raises(kind, match=f"{message}.*is done and kept in .out.pma-partial") as raised:
            engine.write(planned, out, save_seconds=0.005)
    assert failing.failed
    assert raised.value.exit_status == 3
    check_resumes(sources, out, expected)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_every_call_that_changes_files_may_fail(
    quick_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One call after the other fails once: an error of ours, nothing looks complete, the next attempt is
    right.
    """
    for module in (blocks, building, provenance):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    paths = tiny_run(quick_folder / "run", steps=3, shapes={"a": (5_000,), "b": (61, 53)}, shards=2)
    with plan(paths, threads=1) as planned:
        engine.write(planned, quick_folder / "expected")
        expected = weights_of(quick_folder / "expected")
        for fail_at in count(1):
            root = quick_folder / f"root{fail_at}"
            root.mkdir()
            if not _fails(planned, root, monkeypatch, expected, fail_at, number):
                break
    assert fail_at > 40


def _fails(
    planned: engine.Plan,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, str],
    fail_at: int,
    number: int,
) -> bool:
    """Whether there was a call `fail_at` to fail."""
    failed: list[str] = []

    def fail(called: int, name: str, path: str) -> None:
        if called == fail_at:
            failed.append(f"{name} {path}")
            raise OSError(number, os.strerror(number))

    out = root / "new" / "out"
    calls = Calls(root, fail)
    raised: list[Exception] = []
    with monkeypatch.context() as patched:
        calls.install(patched)
        try:
            engine.write(planned, out)
        except Exception as error:
            raised.append(error)
    try:
        if failed:
            assert [error for error in raised if isinstance(error, PmaError)], raised
        found = check_complete(root, {out: expected})
        if not found:
            engine.write(planned, out)
        check_finished(out, expected)
        assert not staging_folder(out).exists()
    except BaseException as error:
        error.add_note(f"failed: {failed}, raised: {raised!r}")
        raise
    return bool(failed)


def _rewrite(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100:] = bytes(100)
    file.write_bytes(data)
    os.utime(file, ns=(5, 5))


CHANGES = {"truncate": lambda f: os.truncate(f, 2 * MIB), "rewrite": _rewrite, "delete": Path.unlink}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("saved_at_once")
def test_a_source_that_changes_in_the_middle(tmp_path: Path, change: str) -> None:
    """While blocks are made: an error that names it; the next attempt does not go on with what was made."""
    paths = tiny_run(tmp_path / "run", steps=3, shapes=SHAPES)
    victim, changed, written = paths[1] / "model.safetensors", [], []

    def progress(read: int, more: int) -> None:
        written.append(more)
        if sum(written) > 8 * MIB and not changed:
            CHANGES[change](victim)
            changed.append(True)

    out = tmp_path / "merges" / "out"
    with plan(paths, threads=1) as planned, pytest.raises((MismatchError, InputError), match="checkpoint-20"):
        engine.write(planned, out, save_seconds=0.005, progress=progress)
    assert changed
    assert not out.exists()
    if change == "rewrite":
        with plan(paths) as planned:
            assert engine.write(planned, out, fresh=staging_folder(out).exists()).bytes_resumed == 0
        assert same_bytes(reference_average(paths, [1 / 3] * 3), out) == []


@pytest.mark.parametrize("change", ["rewrite", "delete"])
@pytest.mark.usefixtures("saved_at_once")
def test_a_source_that_changes_before_the_resume(tmp_path: Path, change: str) -> None:
    paths = tiny_run(tmp_path / "run", steps=3, shapes=SHAPES)
    out = tmp_path / "merges" / "out"

    class Stopped(Exception):
        pass

    written = []

    def progress(read: int, more: int) -> None:
        written.append(more)
        if sum(written) > 8 * MIB:
            raise Stopped

    with plan(paths, threads=1) as planned, pytest.raises(Stopped):
        engine.write(planned, out, save_seconds=0.005, progress=progress)
    CHANGES[change](paths[1] / "model.safetensors")
    if change == "delete":  # the command cannot be planned; without that checkpoint it is another merge
        with pytest.raises(InputError, match="checkpoint-20"):
            plan(paths)
        del paths[1]
    with plan(paths) as planned:
        with pytest.raises(UsageError, match=r"its sources were not the same.*--fresh"):
            engine.write(planned, out)
        assert staging_folder(out).is_dir()
        assert engine.write(planned, out, fresh=True).bytes_resumed == 0
    assert same_bytes(reference_average(paths, [1 / len(paths)] * len(paths)), out) == []
    assert engine.verify(out).findings == ()


SLOW_COMMAND = """
import sys, time
from pma.engine import building, commit
from pma.formats.folder_writer import FolderPart as Part
write = Part.write
Part.write = lambda *a: (write(*a), time.sleep(0.2))[0]
kept_up = building.kept_up
commit.kept_up = lambda buildings, stop, seconds: kept_up(buildings, stop, 0.05)
from pma.cli import main
main()
"""


def start(command: list[str], out: Path) -> subprocess.Popen[str]:
    """`pma merge` with slow writes, once its journal knows of something done."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = staging_folder(out) / ".pma-journal"
    deadline = time.monotonic() + 60
    while not journal.exists() or b"chunks" not in journal.read_bytes():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_seconds_from_signal_to_exit(
    tmp_path: Path, sources: list[Path], expected: dict[str, str], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = ["merge", *map(str, sources), "-o", str(out), "--json", "--threads", "2"]
    process = start(command, out)
    sent = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=60)
    seconds = time.monotonic() - sent
    printed, noted = process.communicate()
    print(f"\n{number.name}: {seconds:.2f} s from signal to exit")
    assert process.returncode == 4
    assert seconds < 2
    assert json.loads(printed)["error"]["kind"] == "Interrupted"
    assert "is done and kept in .out.pma-partial" in noted
    assert check_complete(tmp_path, {out: expected}) == []
    again = subprocess.run([sys.executable, "-m", "pma", *command], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["bytes_resumed"] > 0
    check_finished(out, expected)


def test_an_interrupt_while_it_is_made_durable(
    tmp_path: Path, sources: list[Path], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing a large output takes long, after the stream; Ctrl-C then says what is kept, too."""
    out = tmp_path / "out"
    sync = FolderPart.sync
    syncs = count(1)

    def interrupted(part: FolderPart) -> None:
        sync(part)
        if next(syncs) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, plan(sources) as planned:
        patched.setattr(FolderPart, "sync", interrupted)
        with pytest.raises(PmaError, match=r"100% of .* is done and kept") as raised:
            engine.write(planned, out, save_seconds=60)
    assert raised.value.exit_status == 4
    with plan(sources) as planned:
        assert engine.write(planned, out).bytes_resumed == planned.bytes_to_write
    check_finished(out, expected)


def test_a_thousand_tiny_tensors(quick_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, building, provenance):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    shapes = {f"layers.{i}.weight": (i % 7, 1 + i % 5) if i % 3 else () for i in range(1000)}
    paths = tiny_run(quick_folder / "run", steps=3, shapes=shapes)
    out = quick_folder / "out"
    failing = Failing("pwrite", errno.EIO, lambda d, n: opened(d).endswith(".safetensors") and n > 8)
    with monkeypatch.context() as patched, plan(paths) as planned, pytest.raises(StorageError):
        patched.setattr(os, "pwrite", failing)
        engine.write(planned, out)
    with plan(paths) as planned:
        engine.write(planned, out)
    assert same_bytes(reference_average(paths, [1 / 3] * 3), out) == []
    assert engine.verify(out, samples=None).findings == ()


@pytest.mark.usefixtures("saved_at_once")
def test_a_tensor_larger_than_the_memory_budget(quick_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tiny_run(quick_folder / "run", steps=2, shapes={"w": (32 * MIB,)})
    out = quick_folder / "out"
    failing = Failing("preadv", errno.EIO, lambda d, n: n > 400)
    with monkeypatch.context() as patched, plan(paths, memory_bytes=20 * MIB) as planned:
        patched.setattr(SafetensorsReader, "descriptor", lambda *_: None)  # so that Python reads
        patched.setattr(os, "preadv", failing)
        with pytest.raises(StorageError, match="is done and kept"):
            engine.write(planned, out, save_seconds=0.01)
    with plan(paths, memory_bytes=20 * MIB) as planned:
        assert planned.bytes_to_write > 3 * planned.options.memory_bytes
        assert engine.write(planned, out).bytes_resumed > 0
    assert same_bytes(reference_average(paths, [1 / 2] * 2), out) == []
