"""Held-out loss, bits per byte and cloze of one model, kept per document so that two models can be paired."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pma.errors import InputError
from pma.evaluation.cloze import cloze_correct, cloze_items
from pma.evaluation.paired import Estimate, by_document, mean_estimate, paired_difference
from pma.evaluation.scoring import Scorer, document_losses
from pma.evaluation.text import Document


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one model scored on one text. `nats` and `tokens` are per document; `cloze` per item, empty if not
    asked for.

    `text_digest` tells whether two evaluations are of the same text with the same settings.
    """

    name: str
    text_digest: str
    context_tokens: int
    text_bytes: int
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    cloze: tuple[bool, ...] = ()
    cloze_documents: tuple[int, ...] = ()

    @property
    def loss(self) -> Estimate:
        """Nats a token."""
        return mean_estimate(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text; comparable across tokenizers."""
        return sum(self.nats) / math.log(2) / self.text_bytes

    @property
    def cloze_accuracy(self) -> float | None:
        """Share of cloze items answered rightly; chance is 0.25."""
        return float(np.mean(self.cloze)) if self.cloze else None

    def to_json(self) -> dict[str, Any]:
        """Summary and raw values."""
        summary = {
            "loss": asdict(self.loss),
            "bits_per_byte": self.bits_per_byte,
            "cloze": self.cloze_accuracy,
        }
        return {"name": self.name, "summary": summary, "raw": asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Evaluation:
        """The inverse of `to_json`."""
        raw: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value["raw"].items()
        }
        return cls(**raw)


def evaluate(name: str, scorer: Scorer, documents: Sequence[Document], *, cloze: int = 400) -> Evaluation:
    """Score `documents`, and `cloze` items made from them (0 for none)."""
    texts = [document.text for document in documents]
    nats_D, tokens_D = document_losses(scorer, texts)
    items = cloze_items(documents, cloze) if cloze else []
    correct = tuple(map(bool, cloze_correct(scorer, items))) if items else ()
    settings = f"{scorer.context_tokens} {cloze} "
    return Evaluation(
        name=name,
        text_digest=hashlib.blake2b("\0".join([settings, *texts]).encode(), digest_size=16).hexdigest(),
        context_tokens=scorer.context_tokens,
        text_bytes=sum(len(text.encode("utf-8")) for text in texts),
        nats=tuple(map(float, nats_D)),
        tokens=tuple(map(int, tokens_D)),
        cloze=correct,
        cloze_documents=tuple(item.document for item in items),
    )


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation, without cloze, of several texts that one model read one by one."""
    digests = "\0".join(part.text_digest for part in parts)
    return Evaluation(
        name=parts[0].name,
        text_digest=hashlib.blake2b(digests.encode(), digest_size=16).hexdigest(),
        context_tokens=parts[0].context_tokens,
        text_bytes=sum(part.text_bytes for part in parts),
        nats=tuple(nats for part in parts for nats in part.nats),
        tokens=tuple(tokens for part in parts for tokens in part.tokens),
    )


def loss_difference(a: Evaluation, b: Evaluation) -> Estimate:
    """Loss of a minus loss of b, paired by document. Raises InputError where they are not of the same
    tokens.
    """
    _check_same_text(a, b)
    return paired_difference(a.nats, b.nats, a.tokens)


def cloze_difference(a: Evaluation, b: Evaluation) -> Estimate | None:
    """Cloze accuracy of a minus that of b, paired by item, errors over documents."""
    _check_same_text(a, b)
    if not a.cloze:
        return None
    differences = np.array(a.cloze, dtype=float) - np.array(b.cloze, dtype=float)
    sums, counts = by_document(a.cloze_documents, differences, len(a.nats))
    used = counts > 0
    return mean_estimate(sums[used], counts[used])


def _check_same_text(a: Evaluation, b: Evaluation) -> None:
    if a.text_digest != b.text_digest or a.tokens != b.tokens:
        raise InputError(
            f"{a.name} and {b.name} were not evaluated on the same text with the same tokenizer; "
            "only bits per byte of one text can be compared"
        )
