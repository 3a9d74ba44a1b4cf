"""A later stage of training: another model's weights, a fresh optimizer, another text or instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pma.errors import InputError, MissingExtra, UsageError
from pma.formats.strict_json import load_object
from pma.pretraining import instructions as rows
from pma.pretraining import run_folder
from pma.pretraining.recipe import CONSTANT, SCHEDULES, Recipe
from pma.pretraining.run_folder import RunRecord, Stage
from pma.pretraining.tokens import load_tokens
from pma.pretraining.train import Pretraining, Progress, train

_LARGEST_SUMMARY_BYTES = 2**24


def further(
    checkpoint: Path,
    out: Path,
    *,
    text: Sequence[str] = (),
    instructions: Sequence[str] = (),
    tokens: int | None = None,
    epochs: float | None = None,
    learning_rate: float,
    final_learning_rate: float | None = None,
    warmup_steps: int | None = None,
    schedule: str = "cosine",
    checkpoint_every: int | None = None,
    log_every_steps: int = 1,
    seed: int | None = None,
    interval_means: bool | None = None,
    prepared: Path | None = None,
    progress: Progress | None = None,
) -> Pretraining:
    """Train the weights of `checkpoint`, of a run of ours or a merge of such, on `text` or on JSONL rows of
    `instructions`, into the run folder `out`; the same call goes on where it was stopped.

    Model, tokenizer, context and batch are those of the checkpoint's run, and so is what is None below.
    `tokens`, or `epochs` over the training side of what is read: the length; a row of instructions counts as
    a whole sequence. The rate rises over `warmup_steps` and falls by `schedule` to `final_learning_rate`, by
    default a tenth. `checkpoint_every`: tokens. `prepared`: a run on the same with the same tokenizer, whose
    prepared text is taken.

    Raises UsageError where that cannot be meant or `out` holds another run, InputError for a checkpoint, text
    or rows that cannot be used, Interrupted when stopped.
    """
    _check_asked(text, instructions, tokens, epochs)
    source = run_folder.run_of(checkpoint)
    before = run_folder.read_record(source).recipe
    floor = _floor(learning_rate, final_learning_rate, schedule)
    recipe = replace(
        before,
        optimizer=replace(
            before.optimizer,
            learning_rate=learning_rate,
            warmup_steps=before.optimizer.warmup_steps if warmup_steps is None else warmup_steps,
        ),
        run=replace(
            before.run,
            # epochs are counted when the text is prepared
            tokens=tokens or before.tokens_a_step,
            checkpoint_every_tokens=checkpoint_every or before.run.checkpoint_every_tokens,
            log_every_steps=log_every_steps,
            seed=before.run.seed if seed is None else seed,
            interval_means=before.run.interval_means if interval_means is None else interval_means,
        ),
    )
    start = Stage(
        checkpoint=checkpoint.resolve(),
        instructions=bool(instructions),
        schedule=schedule,
        final_learning_rate=floor,
        tokens=tokens,
        epochs=epochs,
    )
    sources = tuple(str(Path(path).resolve()) for path in (*text, *instructions))
    record = RunRecord(recipe=recipe, text=sources, stage=start)
    if tokens is not None:
        _check_warmup(recipe, recipe.steps_for(tokens))
    run_folder.enter(out, record)
    if prepared is not None:
        run_folder.borrow_text(out, prepared)
    _prepare(out, record, source)
    steps = _steps(out, record)
    _check_warmup(recipe, steps)
    whole = replace(recipe, run=replace(recipe.run, tokens=steps * recipe.tokens_a_step))
    record = replace(record, recipe=whole)
    run_folder.enter(out, record)
    made = train(out, record, steps, run_folder.newest_checkpoint(out), progress)
    return replace(made, notes=_notes(out, record))


def _check_asked(
    text: Sequence[str], instructions: Sequence[str], tokens: int | None, epochs: float | None
) -> None:
    if bool(text) == bool(instructions):
        raise UsageError("a later stage is on another text or on instructions: give one of them")
    if (tokens is None) == (epochs is None):
        raise UsageError("how long is the stage? Give its length in tokens or in epochs, one of them")
    if tokens is not None and tokens < 1:
        raise UsageError(f"a stage of {tokens} tokens; expected at least one")
    if epochs is not None and not 0 < epochs < math.inf:
        raise UsageError(f"a stage of {epochs} epochs; expected more than 0")


def _floor(learning_rate: float, final_learning_rate: float | None, schedule: str) -> float:
    """The rate at the end."""
    if schedule not in SCHEDULES:
        raise UsageError(f"--schedule {schedule}: expected one of {', '.join(SCHEDULES)}")
    if schedule == CONSTANT:
        if final_learning_rate not in (None, learning_rate):
            raise UsageError("a constant rate has no other final rate; leave it out, or say another schedule")
        return learning_rate
    floor = learning_rate / 10 if final_learning_rate is None else final_learning_rate
    if not 0 <= floor <= learning_rate:
        raise UsageError(
            f"final learning rate {floor:g}: expected one from 0 to the learning rate, {learning_rate:g}"
        )
    return floor


def _check_warmup(recipe: Recipe, steps: int) -> None:
    if recipe.optimizer.warmup_steps >= steps:
        raise UsageError(
            f"a warmup of {recipe.optimizer.warmup_steps} steps fills the whole stage of {steps}; say "
            "--warmup-steps, or make it longer"
        )


def _prepare(out: Path, record: RunRecord, source: Path) -> None:
    """The text of the stage, in the tokens of the run that its checkpoint is from."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("pre-training", "train", "transformers") from error
    if not (source / run_folder.TEXT_FOLDER).is_dir():
        raise InputError(f"{source / run_folder.TEXT_FOLDER} is missing, and in it the model's tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source / run_folder.TEXT_FOLDER, local_files_only=True)
    if record.stage is not None and record.stage.instructions:
        rows.prepare(out, record.text, tokenizer, record.recipe.text.context_tokens)
    else:
        run_folder.prepare_text(out, record.recipe, record.text, tokenizer)


def _steps(out: Path, record: RunRecord) -> int:
    recipe, stage = record.recipe, record.stage
    assert stage is not None
    if stage.epochs is None:
        return recipe.steps_for(recipe.run.tokens)
    text = out / run_folder.TEXT_FOLDER
    if stage.instructions:
        sequences = rows.rows_of(text)
    else:
        sequences = len(load_tokens(text / run_folder.TOKENS_FILE)) // recipe.text.context_tokens
    return max(1, math.ceil(stage.epochs * sequences / recipe.run.batch_sequences))


def _notes(out: Path, record: RunRecord) -> tuple[str, ...]:
    """What became of rows that did not fit."""
    assert record.stage is not None
    if not record.stage.instructions:
        return ()
    summary = load_object(out / run_folder.TEXT_FOLDER / run_folder.SUMMARY_FILE, _LARGEST_SUMMARY_BYTES)
    context, count = record.recipe.text.context_tokens, summary["rows"]["training"]
    told = [f"{count} rows to train on, {summary['near_duplicates_dropped']} near-duplicates dropped"]
    if summary["training_responses_cut"]:
        told.append(f"{summary['training_responses_cut']} responses cut at the context's {context} tokens")
    dropped = summary["rows_without_room_for_a_response_dropped"]
    if dropped:
        told.append(f"{dropped} rows dropped: empty responses, or prompts that fill the context")
    return tuple(told)
