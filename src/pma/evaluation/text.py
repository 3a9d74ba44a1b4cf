"""Text as documents: files and folders, plain or .xz; documents of one file are separated by a line
`<|endoftext|>`.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pma.errors import InputError

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A piece of text that is kept whole. Documents of one `group` go to the same side of a split."""

    name: str
    text: str
    group: str = ""


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """The documents below `paths`, in order of file name. Raises InputError for what is missing, empty or
    not text.
    """
    documents = [document for path in paths for file in _files(path) for document in _read(file)]
    if not documents:
        raise InputError(f"{', '.join(map(str, paths))} holds no text")
    return documents


def inseparable(
    documents: Iterable[Document], *, seed: int = 0, beginning_characters: int | None = None
) -> list[tuple[Document, ...]]:
    """Documents that no split may part: those of one group, and equal ones, or those whose first
    `beginning_characters` are. In an order that hangs on their content and the seed alone.
    """
    together: dict[bytes, list[Document]] = {}
    for document in sorted(documents, key=lambda document: document.text):
        text = document.text[:beginning_characters]
        what = f"group {document.group}" if document.group else f"text {text}"
        together.setdefault(blake3(f"{seed} {what}".encode()).digest(), []).append(document)
    return [tuple(together[key]) for key in sorted(together)]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write `documents` into one file, separated as `read_documents` expects."""
    text = f"\n{SEPARATOR}\n".join(document.text for document in documents)
    path.write_text(text + "\n", encoding="utf-8")


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a text file or a folder of them")
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def _read(path: Path) -> Iterator[Document]:
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = data.decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise InputError(
            f"{path} is not UTF-8 text{' in .xz' if path.suffix == '.xz' else ''}: {error}"
        ) from error
    for number, part in enumerate(text.split(f"\n{SEPARATOR}\n")):
        cleaned = part.removesuffix(f"\n{SEPARATOR}").strip("\n")
        if cleaned.strip():
            yield Document(name=f"{path.name}:{number}", text=cleaned)
