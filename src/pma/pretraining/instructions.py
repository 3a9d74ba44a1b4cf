"""Prompts and responses as training data: prepared once, of the responses alone is the loss taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pma.evaluation import Document
from pma.evaluation.responses import Encoded, Exchange, encode_exchange, read_exchanges, write_exchanges
from pma.pretraining import run_folder
from pma.pretraining.corpus import split
from pma.pretraining.tokens import load_tokens, save_json, save_tokens

ROWS_FILE = "rows.npy"
HELD_OUT_FILE, VALIDATION_FILE = "held_out.jsonl", "validation.jsonl"
_NO_LOSS = -100  # what transformers leaves out of a loss


def prepare(folder: Path, files: Sequence[str], tokenizer: Any, context_tokens: int) -> Path:
    """Read, split, deduplicate and tokenize the rows once; later calls find them. Returns the text folder.

    A response that does not fit into the context is cut; a row without room for any is dropped.
    """
    target = folder / run_folder.TEXT_FOLDER
    if target.is_dir():
        return target
    exchanges = read_exchanges([Path(file) for file in files])
    usable: dict[str, tuple[Exchange, Encoded]] = {}
    for number, exchange in enumerate(exchanges):
        encoded = encode_exchange(tokenizer, exchange, context_tokens)
        if encoded is not None:
            usable[str(number)] = exchange, encoded
    documents = [Document(name=key, text=f"{e.prompt}\n{e.response}") for key, (e, _) in usable.items()]
    corpus = split(documents, ", ".join(files))
    rows = [usable[document.name][1] for document in corpus.training]
    with run_folder.building_text(folder) as partial:
        tokenizer.save_pretrained(partial)
        lengths = [len(row.ids) for row in rows]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        save_tokens(partial / ROWS_FILE, _unsigned(np.stack([starts, lengths, [r.given for r in rows]], 1)))
        save_tokens(partial / run_folder.TOKENS_FILE, _unsigned(np.concatenate([row.ids for row in rows])))
        for name, side in ((HELD_OUT_FILE, corpus.held_out), (VALIDATION_FILE, corpus.validation)):
            write_exchanges(partial / name, [usable[document.name][0] for document in side])
        summary = {
            "source": corpus.source,
            "near_duplicates_dropped": corpus.dropped,
            "rows": corpus.counts,
            "rows_without_room_for_a_response_dropped": len(exchanges) - len(usable),
            "training_responses_cut": sum(row.cut for row in rows),
            "training_response_tokens": sum(len(row.ids) - row.given for row in rows),
            "training_tokens": sum(lengths),
        }
        save_json(partial / run_folder.SUMMARY_FILE, summary)
    return target


def _unsigned(values: NDArray[Any]) -> NDArray[np.uint32]:
    return values.astype(np.uint32)


class InstructionRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Row i of a run, a pure function of (rows, seed, i): one exchange a sequence, padded at its end. Each
    epoch goes through all of them in an order of its own.
    """

    def __init__(
        self, text: Path, *, context_tokens: int, count: int, seed: int, skip: tuple[int, int] = (0, 0)
    ) -> None:
        self._skip_from, self._skipped = skip
        self._tokens = load_tokens(text / run_folder.TOKENS_FILE)
        self._rows = load_tokens(text / ROWS_FILE)  # start, length, how many are given; shape (rows, 3)
        self._context_tokens = context_tokens
        self._count = count
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self._skip_from:
            index += self._skipped
        epoch, position = divmod(index, len(self._rows))
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        start, length, given = map(int, self._rows[int(self._orders[epoch][position])])
        ids = torch.zeros(self._context_tokens, dtype=torch.int64)  # what pads is neither seen nor learnt
        ids[:length] = torch.from_numpy(self._tokens[start : start + length].astype(np.int64))
        labels = ids.clone()
        labels[:given] = _NO_LOSS
        labels[length:] = _NO_LOSS
        mask = torch.zeros_like(ids)
        mask[:length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows_of(text: Path) -> int:
    """How many rows there are to train on."""
    return len(load_tokens(text / ROWS_FILE))
