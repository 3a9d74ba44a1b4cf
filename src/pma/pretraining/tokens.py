"""From documents to training sequences: a BPE tokenizer, a file of token ids, and a fixed order to read it
in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pma.errors import InputError, MissingExtra
from pma.evaluation import Document
from pma.evaluation.text import SEPARATOR

_TEXT_BYTES_FOR_TOKENIZER = 64 * 2**20


def train_tokenizer(documents: Sequence[Document], vocabulary_tokens: int) -> Any:
    """A byte-level BPE tokenizer with one special token, `<|endoftext|>`, as transformers loads it."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtra("pre-training", "train", "tokenizers and transformers") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_some(documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR)


def _some(documents: Sequence[Document]) -> Iterator[str]:
    seen = 0
    for document in documents:
        if seen > _TEXT_BYTES_FOR_TOKENIZER:
            return
        seen += len(document.text)
        yield document.text


def encode_documents(tokenizer: Any, documents: Sequence[Document]) -> NDArray[np.uint32]:
    """All documents as one stream of ids, each begun by the end-of-text token. Shape (tokens,)."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([document.text for document in documents])
    start = np.array([tokenizer.eos_token_id], dtype=np.uint32)
    return np.concatenate([part for e in encoded for part in (start, np.asarray(e.ids, dtype=np.uint32))])


class PackedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequence i of a run, a pure function of (tokens, seed, i): so resumed and forked runs see the same
    data.

    The stream is cut into sequences of `context_tokens`; each epoch goes through all of them in an order of
    its own. `skip`: from the sequence of the first number on, so many are left out.
    """

    def __init__(
        self,
        tokens: NDArray[np.uint32],
        *,
        context_tokens: int,
        count: int,
        seed: int,
        skip: tuple[int, int] = (0, 0),
    ) -> None:
        self._skip_from, self._skipped = skip
        self._tokens = tokens
        self._context_tokens = context_tokens
        self._count = count
        self._seed = seed
        self._an_epoch = len(tokens) // context_tokens
        if self._an_epoch == 0:
            raise InputError(
                f"the training text has {len(tokens)} tokens, less than one sequence of {context_tokens}"
            )
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self._skip_from:
            index += self._skipped
        epoch, position = divmod(index, self._an_epoch)
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._an_epoch)
        start = int(self._orders[epoch][position]) * self._context_tokens
        ids = torch.from_numpy(self._tokens[start : start + self._context_tokens].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def save_tokens(path: Path, tokens: NDArray[np.uint32]) -> None:
    """Write ids; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.save(file, tokens)
    partial.rename(path)


def load_tokens(path: Path) -> NDArray[np.uint32]:
    """Read ids that `save_tokens` wrote, mapped rather than loaded."""
    if not path.is_file():
        raise InputError(f"{path} is missing; the run's text was not prepared, or was moved")
    tokens: NDArray[np.uint32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return tokens


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small JSON file; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)
