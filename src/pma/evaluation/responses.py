"""Prompts and responses: rows of `{prompt, response}`, their tokens, and what a model makes of the
responses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma.errors import FormatError, InputError
from pma.evaluation.evaluate import Evaluation
from pma.evaluation.rows import read_rows
from pma.evaluation.scoring import Scorer, response_nats


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A prompt and the response to it."""

    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An exchange as token ids: end of text, the prompt and a line break, all of which are `given`; the
    response and end of text. `cut`: its end fell behind the context.
    """

    ids: tuple[int, ...]
    given: int
    cut: bool


def read_exchanges(paths: Sequence[Path]) -> list[Exchange]:
    """The rows of JSONL files, plain or .xz; fields other than prompt and response are passed over.

    Raises InputError for what is missing or empty, FormatError for a line that is no such row.
    """
    exchanges = []
    for path in paths:
        if not path.is_file():
            raise InputError(f'{path} is no file; expected JSONL rows {{"prompt": …, "response": …}}')
        for number, row in read_rows(path):
            for name in ("prompt", "response"):
                if not isinstance(row.get(name), str):
                    raise FormatError(f"{path}, line {number}: has no {name} that is text")
            exchanges.append(Exchange(prompt=row["prompt"], response=row["response"]))
    if not exchanges:
        raise InputError(f"{', '.join(map(str, paths))} holds no rows of prompt and response")
    return exchanges


def write_exchanges(path: Path, exchanges: Iterable[Exchange]) -> None:
    """Write rows as `read_exchanges` reads them."""
    rows = [json.dumps({"prompt": e.prompt, "response": e.response}, ensure_ascii=False) for e in exchanges]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def encode_exchange(tokenizer: Any, exchange: Exchange, context_tokens: int) -> Encoded | None:
    """Its tokens, at most `context_tokens`; None where no token of a response would be among them."""
    end = tokenizer.eos_token_id
    response = tokenizer.encode(exchange.response, add_special_tokens=False)
    given = [end, *tokenizer.encode(f"{exchange.prompt}\n", add_special_tokens=False)]
    if not response or len(given) >= context_tokens:
        return None
    ids = (*given, *response, end)
    return Encoded(ids=ids[:context_tokens], given=len(given), cut=len(ids) > context_tokens)


def evaluate_responses(name: str, scorer: Scorer, exchanges: Sequence[Exchange]) -> Evaluation:
    """The loss on the responses, prompts given; a row stands for a document. Rows whose prompt fills the
    context are left out.
    """
    encoded = [encode_exchange(scorer.tokenizer, each, scorer.context_tokens) for each in exchanges]
    kept = [(exchange, row) for exchange, row in zip(exchanges, encoded, strict=True) if row is not None]
    texts = [f"{exchange.prompt}\0{exchange.response}" for exchange, _ in kept]
    settings = f"responses {scorer.context_tokens}"
    return Evaluation(
        name=name,
        text_digest=hashlib.blake2b("\0".join([settings, *texts]).encode(), digest_size=16).hexdigest(),
        context_tokens=scorer.context_tokens,
        text_bytes=sum(len(exchange.response.encode()) for exchange, _ in kept),
        nats=tuple(map(float, response_nats(scorer, [(row.ids, row.given) for _, row in kept]))),
        tokens=tuple(len(row.ids) - row.given for _, row in kept),
    )
