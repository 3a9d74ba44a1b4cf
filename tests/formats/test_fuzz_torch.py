"""Fuzzing the parsers of pickles, zip directories and archives, from a corpus of good and hostile files:
whatever comes in, a value or one of our errors comes out, soon, and nothing is imported, opened or run.

`PMA_FUZZ_EXAMPLES` says how many examples each target tries; CI's own time is bounded by the default.
"""

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pma.errors import FormatError, IncompleteError
from pma.formats import torch_files
from pma.formats.folder import LocalFolder
from pma.formats.pickle_scan import scan
from pma.formats.torch_archive import TORCH
from pma.formats.unpickling import PLAIN, unpickle
from pma.formats.zip_directory import read_directory

CORPUS = Path(__file__).parent / "corpus"
PICKLES = [path.read_bytes() for path in sorted((CORPUS / "pickles").iterdir())]
ARCHIVES = [path.read_bytes() for path in sorted((CORPUS / "archives").iterdir())]
EXAMPLES = int(os.environ.get("PMA_FUZZ_EXAMPLES", "400"))
MOST_SECONDS = 1.0
# what code that a pickle made run would have to do first
TELLING = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "exec", "compile", "import", "open")
fuzzing = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

_watched: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event in TELLING:
        _watched.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_hear)  # it cannot be taken off again, and does nothing unless watched


@contextmanager
def harmless(*allowed: str) -> Iterator[None]:
    """Nothing telling happens in the block, and it ends soon."""
    global _watched
    started, _watched = time.process_time(), []
    try:
        yield
    finally:
        heard, _watched = _watched, None
    assert not [event for event in heard if not event.startswith(allowed or ("\0",))], heard
    assert time.process_time() - started < MOST_SECONDS


def mutated(corpus: list[bytes]) -> st.SearchStrategy[bytes]:
    """A file of the corpus with some bytes overwritten, put in, taken out, or taken from another one."""
    place = st.floats(0, 1)
    edit = st.tuples(st.sampled_from(["over", "in", "out", "copy"]), place, place, st.binary(max_size=8))

    def apply(data: bytes, other: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
        for kind, where, length, new in edits:
            at = int(where * len(data))
            count = int(length * 16)
            if kind == "over":
                data = data[:at] + new + data[at + len(new) :]
            elif kind == "in":
                data = data[:at] + new + data[at:]
            elif kind == "out":
                data = data[:at] + data[at + count :]
            else:
                start = int(length * len(other))
                data = data[:at] + other[start : start + 64] + data[at:]
        return data

    return st.builds(apply, st.sampled_from(corpus), st.sampled_from(corpus), st.lists(edit, max_size=4))


SNIPPETS = [
    getattr(pickle, name)
    for name in pickle.__all__
    if name.isupper() and isinstance(getattr(pickle, name), bytes)
]
SNIPPETS += [
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"cos\nsystem\n",
]
SNIPPETS += [
    b"K\x01",
    b"q\x00",
    b"q\x01",
    b"h\x00",
    b"h\x01",
    b"X\x01\x00\x00\x00a",
    b"\x8c\x01b",
    b"]",
    b"}",
    b"(",
    b")",
]
programs = st.lists(st.sampled_from(SNIPPETS), max_size=40).map(
    lambda parts: b"\x80\x04" + b"".join(parts) + b"."
)


@fuzzing
@given(st.one_of(mutated(PICKLES), programs, st.binary(max_size=200)))
def test_pickles(data: bytes) -> None:
    with harmless():
        try:
            unpickle(data, "x", globals=TORCH)
        except FormatError:
            return
        # what was let through names nothing but what stands in the lists
        assert set(scan(data, "x", 2**30).globals) <= {*PLAIN, *TORCH}


def in_a_file(data: bytes, parse: Callable[[Path], Any], name: str = "model.pt") -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        with harmless("open"):
            message = name
            try:
                parse(path)
            except (FormatError, IncompleteError) as error:
                message = str(error)
        assert name in message
        assert message.isprintable()


@fuzzing
@given(mutated(ARCHIVES))
def test_zip_directories(data: bytes) -> None:
    def parse(path: Path) -> None:
        with closing(LocalFolder(path.parent)) as folder:
            found = read_directory(folder, path.name, 0, len(data))
        ends = sorted((m.offset_bytes, m.offset_bytes + m.length_bytes) for m in found.members.values())
        assert all(0 <= start <= end <= len(data) for start, end in ends)
        assert all(one[1] <= two[0] for one, two in pairwise(ends))

    in_a_file(data, parse)


@fuzzing
@given(mutated(ARCHIVES))
def test_checkpoints(data: bytes) -> None:
    def parse(path: Path) -> None:
        with closing(torch_files.open_reader(path)) as reader:
            for name, spec in reader.tensors.items():
                (fragment,) = reader.fragments(name)
                assert fragment.length_bytes == spec.length_bytes
                assert 0 <= fragment.offset_bytes <= len(data) - fragment.length_bytes
            torch_files.plan_layout(reader.tensors, reader)
        assert torch_files.read_meta(path).incomplete is None

    in_a_file(data, parse)


@pytest.mark.parametrize("path", sorted((CORPUS / "archives").glob("trick_*")), ids=lambda path: path.stem)
def test_every_trick_of_the_corpus_is_refused(path: Path) -> None:
    with pytest.raises((FormatError, IncompleteError)):
        torch_files.open_reader(path)


@pytest.mark.parametrize("path", sorted((CORPUS / "pickles").glob("runs_*")), ids=lambda path: path.stem)
def test_every_call_of_the_corpus_is_refused(path: Path) -> None:
    with harmless("open"), pytest.raises(FormatError, match="refused"):
        unpickle(path.read_bytes(), "x")
