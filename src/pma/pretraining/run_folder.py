"""The folder of a run: what was asked for, the prepared text, and which checkpoint to go on from.

run.json           recipe, text and start, as asked for
text/              tokenizer, token ids, validation.txt, held_out.txt (of instructions: .jsonl)
checkpoint-N/      as the transformers Trainer writes them, and the mean since the last one
tensorboard/       event files
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pma.errors import InputError, UsageError, printable
from pma.evaluation import write_documents
from pma.formats import hf_trainer, open_checkpoint
from pma.formats.strict_json import load_object
from pma.pretraining.corpus import load_corpus
from pma.pretraining.recipe import Recipe, from_tables
from pma.pretraining.tokens import encode_documents, save_json, save_tokens, train_tokenizer
from pma.trajectory import discover

RECORD_FILE = "run.json"
TEXT_FOLDER = "text"
HELD_OUT_FILE = "held_out.txt"
VALIDATION_FILE = "validation.txt"
TOKENS_FILE = "tokens.npy"
SUMMARY_FILE = "text.json"
_LARGEST_RECORD_BYTES = 2**20
_LARGEST_MERGE_RECORD_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A decay that starts from a checkpoint of another run: its shape, where it starts, how long it is."""

    checkpoint: Path
    start_step: int
    anneal: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A checkpoint of another run, or made from such, that training goes on from; the data of `skip_steps`
    steps after it are left out.
    """

    checkpoint: Path
    start_step: int
    skip_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A later stage of training, from a checkpoint's weights with a fresh optimizer, on text or
    instructions. `tokens` or `epochs`: how long; until then the rate falls to `final_learning_rate`.
    """

    checkpoint: Path
    instructions: bool
    schedule: str
    final_learning_rate: float
    tokens: int | None = None
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What `run.json` says."""

    recipe: Recipe
    text: tuple[str, ...]
    fork: Fork | None = None
    resumed: Resumption | None = None
    stage: Stage | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `run.json`."""
        record = {"pma_run": 1, "recipe": self.recipe.to_json(), "text": list(self.text)}
        record["fork"] = _plain(self.fork)
        later = {"resumed": _plain(self.resumed), "stage": _plain(self.stage)}
        return record | {name: start for name, start in later.items() if start is not None}


def _plain(start: Fork | Resumption | Stage | None) -> dict[str, Any] | None:
    return None if start is None else {**start.__dict__, "checkpoint": str(start.checkpoint)}


Start = TypeVar("Start", Fork, Resumption, Stage)


def _start(kind: type[Start], value: dict[str, Any] | None) -> Start | None:
    return kind(**{**value, "checkpoint": Path(value["checkpoint"])}) if value else None


def read_record(folder: Path) -> RunRecord:
    """Read `run.json`. Raises InputError where the folder is not a run of `pma pretrain`."""
    path = folder / RECORD_FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no {RECORD_FILE}; expected a run that `pma pretrain` made")
    value = load_object(path, _LARGEST_RECORD_BYTES)
    try:
        return RunRecord(
            recipe=from_tables(value["recipe"], str(path)),
            text=tuple(value["text"]),
            fork=_start(Fork, value.get("fork")),
            resumed=_start(Resumption, value.get("resumed")),
            stage=_start(Stage, value.get("stage")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {printable(repr(error))}") from error


def enter(folder: Path, asked: RunRecord) -> None:
    """Make the folder and its record, or check that it is the same run. More tokens than before is the same
    run, longer; fewer leave its record as it is where it was trained that far.

    Raises UsageError where the folder holds something else.
    """
    if not (folder / RECORD_FILE).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not a run of `pma pretrain`; choose another output")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        before = read_record(folder)
        same_length = replace(before.recipe, run=replace(before.recipe.run, tokens=asked.recipe.run.tokens))
        changed = replace(before, recipe=same_length) != asked
        if changed and not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder / TEXT_FOLDER, ignore_errors=True)  # nothing was trained yet: start afresh
        elif changed:
            raise UsageError(
                f"{folder} holds a run of another recipe, text, seed or start "
                f"({_difference(before, asked)}); choose another output"
            )
        elif _is_trained(folder, asked.recipe):
            return
    save_json(folder / RECORD_FILE, asked.to_json())


def _is_trained(folder: Path, recipe: Recipe) -> bool:
    """Whether the run has a checkpoint at or past the recipe's last step."""
    newest = newest_checkpoint(folder)
    return newest is not None and newest[1] >= recipe.steps_for(recipe.run.tokens)


def _difference(before: RunRecord, asked: RunRecord) -> str:
    flat_before, flat_asked = _flat(before.to_json()), _flat(asked.to_json())
    changed = [key for key in flat_asked | flat_before if flat_asked.get(key) != flat_before.get(key)]
    key = next((key for key in changed if key != "recipe.run.tokens"), "tokens")
    return f"{key}: {flat_before.get(key)} there, {flat_asked.get(key)} asked for"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items = [_flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items()]
    return {key: inner for item in items for key, inner in item.items()}


def prepare_text(folder: Path, recipe: Recipe, text: Sequence[str], tokenizer: Any = None) -> Path:
    """Split, deduplicate and tokenize the text once; later calls find it. Returns the text folder.
    `tokenizer`: another model's; by default one is trained.
    """
    target = folder / TEXT_FOLDER
    if target.is_dir():
        return target
    corpus = load_corpus([Path(path) for path in text])
    with building_text(folder) as partial:
        if tokenizer is None:
            tokenizer = train_tokenizer(corpus.training, recipe.text.vocabulary_tokens)
        tokenizer.save_pretrained(partial)
        tokens = encode_documents(tokenizer, corpus.training)
        save_tokens(partial / TOKENS_FILE, tokens)
        write_documents(partial / HELD_OUT_FILE, corpus.held_out)
        write_documents(partial / VALIDATION_FILE, corpus.validation)
        summary = {
            "source": corpus.source,
            "near_duplicates_dropped": corpus.dropped,
            "documents": corpus.counts,
            "training_tokens": len(tokens),
        }
        save_json(partial / SUMMARY_FILE, summary)
    return target


@contextmanager
def building_text(folder: Path) -> Iterator[Path]:
    """A hidden folder that becomes the run's text folder once it is whole."""
    partial = folder / f".{TEXT_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.rename(folder / TEXT_FOLDER)


def borrow_text(folder: Path, trunk: Path) -> Path:
    """Give a run the prepared text of another, by hard links where the file system has them."""
    target, source = folder / TEXT_FOLDER, trunk / TEXT_FOLDER
    if target.is_dir():
        return target
    if not source.is_dir():
        raise InputError(f"{source} is missing; the run that it belongs to has lost its prepared text")
    with building_text(folder) as partial:
        shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)
    return target


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; for one that PMA made, that of its newest source.

    Raises UsageError where it is none, InputError where its run is none of ours, or is gone.
    """
    if (checkpoint / hf_trainer.RECORD_FILE).is_file():
        value = load_object(checkpoint / hf_trainer.RECORD_FILE, _LARGEST_MERGE_RECORD_BYTES)
        try:
            return Path(str(value["sources"][-1]["path"])).parent
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{checkpoint / hf_trainer.RECORD_FILE} is damaged: {printable(repr(error))}"
            ) from error
    if not (checkpoint / hf_trainer.STATE_FILE).is_file():
        raise UsageError(
            f"{checkpoint} is no checkpoint of the Trainer; expected a checkpoint of a run, or what "
            "`pma init` made of several"
        )
    return checkpoint.parent


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint of the run that is whole, and its step; None where there is none yet."""
    if not any(folder.glob("checkpoint-*")):
        return None
    try:
        points = discover([folder]).points
    except InputError:
        return None  # all there is, is incomplete
    for point in reversed(points):
        if point.path.parent != folder:
            continue  # kept to be averaged, perhaps without the optimizer's state
        try:
            open_checkpoint(point.path).close()
        except InputError:
            continue  # cut short: the one before it is gone back to
        return point.path, point.step or 0
    return None
