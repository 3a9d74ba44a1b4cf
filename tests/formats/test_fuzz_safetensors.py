"""Fuzzing the parser of safetensors headers, from a corpus of good and hostile files: it reads a file or
refuses it, soon, by name, and what it reads lies in the file.
"""

import json
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pma.errors import FormatError, IncompleteError, InputError
from pma.formats import interval_mean, safetensors

from .test_fuzz_torch import CORPUS, fuzzing, in_a_file, mutated

FILES = sorted((CORPUS / "safetensors").iterdir())
WHOLE = [path.read_bytes() for path in FILES]


def read(path: Path) -> None:
    with closing(safetensors.open_reader(path)) as reader:
        size_bytes = path.stat().st_size
        for name, spec in reader.tensors.items():
            (fragment,) = reader.fragments(name)
            assert fragment.length_bytes == spec.length_bytes
            assert 0 <= fragment.offset_bytes <= size_bytes - fragment.length_bytes
    with suppress(FormatError):
        interval_mean.read_record(path)


def with_length_put_right(data: bytes) -> bytes:
    """As if the header ended where the longest JSON object in it does: edits then reach the checks behind."""
    end = data.rfind(b"}", 8) + 1
    return max(end - 8, 0).to_bytes(8, "little") + data[8:]


@fuzzing
@given(st.one_of(mutated(WHOLE), mutated(WHOLE).map(with_length_put_right), st.binary(max_size=200)))
def test_headers(data: bytes) -> None:
    in_a_file(data, read, "model.safetensors")


@fuzzing
@given(mutated([json.dumps({"weight_map": {"a": "x.safetensors", "b": "../y.safetensors"}}).encode()]))
def test_indexes(data: bytes) -> None:
    def parse(path: Path) -> None:
        with suppress(InputError):
            safetensors.open_reader(path.parent).close()

    in_a_file(data, parse, "model.safetensors.index.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_corpus(path: Path) -> None:
    if path.name.startswith("trick_"):
        with pytest.raises((FormatError, IncompleteError)):
            read(path)
    else:
        read(path)
