"""The text of a run: the embedded default or the user's, split by document into training and held-out, no
near-duplicates.

The default is the Python standard library's own source: real text, present wherever Python is.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pma.errors import InputError, MissingExtra
from pma.evaluation import Document, read_documents

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
)
_SMALLEST_BYTES = 200
# shares of the documents' groups; validation is for choosing (learning rates), held-out only for reporting
_HELD_OUT, _VALIDATION = 0.12, 0.06
_NEAR_DUPLICATE = 0.7  # Jaccard similarity of the sets of 5-word shingles
_PERMUTATIONS = 64


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on, to choose by, and to report on; `dropped` near-duplicates went from all
    three.
    """

    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    held_out: tuple[Document, ...]
    dropped: int
    source: str

    @property
    def counts(self) -> dict[str, int]:
        """How many documents each side has."""
        return {
            "training": len(self.training),
            "validation": len(self.validation),
            "held_out": len(self.held_out),
        }


def load_corpus(paths: Sequence[Path]) -> Corpus:
    """The corpus from `paths`, or the embedded default for none. The same text always splits the same way.

    Raises InputError where a side of the split would be empty.
    """
    if paths:
        documents, source = read_documents(paths), ", ".join(map(str, paths))
    else:
        documents, source = standard_library(), "the Python standard library's source"
    return split(documents, source)


def split(documents: Sequence[Document], source: str) -> Corpus:
    """The corpus of `documents`, which are from `source`. Raises InputError where a side would be empty."""
    kept = without_near_duplicates(documents)
    sides: dict[str, list[Document]] = {"held_out": [], "validation": [], "training": []}
    for document in kept:
        sides[_side(document)].append(document)
    for side, members in sides.items():
        if not members:
            raise InputError(
                f"{source} has {len(kept)} different documents, too few: none fell to {side}. Each goes to a "
                "side by "
                f"its hash, {_HELD_OUT:.0%} of them held out and {_VALIDATION:.0%} for validation, so give a "
                "hundred "
                "or more. A file is one document, or several separated by lines <|endoftext|>"
            )
    return Corpus(
        training=tuple(sides["training"]),
        validation=tuple(sides["validation"]),
        held_out=tuple(sides["held_out"]),
        dropped=len(documents) - len(kept),
        source=source,
    )


def standard_library() -> list[Document]:
    """Python's own modules, grouped by top-level package, so that a package is never on both sides of the
    split.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(inside.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= _SMALLEST_BYTES:
                group = inside.parts[0].removesuffix(".py").lstrip("_")
                documents.append(Document(name=str(inside), text=text, group=group))
    if not documents:
        raise InputError(f"{root} holds no Python source here; give training text with --text")
    return documents


def _side(document: Document) -> str:
    key = document.group or document.text
    share = int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "big") / 2**64
    if share < _HELD_OUT:
        return "held_out"
    return "validation" if share < _HELD_OUT + _VALIDATION else "training"


def without_near_duplicates(documents: Sequence[Document]) -> list[Document]:
    """The documents less those that repeat an earlier one: estimated Jaccard similarity of 5-word shingles
    ≥ 0.7.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise MissingExtra("pre-training", "train", "datasketch") from error
    index = MinHashLSH(threshold=_NEAR_DUPLICATE, num_perm=_PERMUTATIONS)
    sketches: dict[int, MinHash] = {}
    kept = []
    for number, document in enumerate(documents):
        shingles = _shingles(document.text)
        sketch = MinHash(num_perm=_PERMUTATIONS, hashfunc=_already_hashed)
        sketch.update_batch(shingles)
        similar = (sketches[other] for other in index.query(sketch))
        if any(sketch.jaccard(other) >= _NEAR_DUPLICATE for other in similar):
            continue
        index.insert(number, sketch)
        sketches[number] = sketch
        kept.append(document)
    return kept


def _shingles(text: str) -> list[int]:
    """Hashes of every five words in a row; of all words together for a shorter text."""
    words = np.array([hash_word(word) for word in re.findall(r"\w+|[^\w\s]+", text)], dtype=np.uint64)
    if len(words) < 5:
        return [int(words.sum() & np.uint64(0xFFFFFFFF))]
    multipliers = np.array([1, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], dtype=np.uint64)
    mixed = np.zeros(len(words) - 4, dtype=np.uint64)
    for i in range(5):
        mixed += words[i : len(words) - 4 + i] * multipliers[i]
    distinct: list[int] = np.unique((mixed >> np.uint64(29)) & np.uint64(0xFFFFFFFF)).tolist()
    return distinct


def hash_word(word: str, _known: dict[str, int] = {}) -> int:  # noqa: B006  # the default is the cache
    """A fixed 32-bit hash of a word (Python's own changes from process to process)."""
    if word not in _known:
        _known[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=4).digest(), "big")
    return _known[word]


def _already_hashed(value: int) -> int:
    return value
