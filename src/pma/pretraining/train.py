"""The reference pre-training: a recipe under the transformers Trainer, warmup then constant, a decay only
in a fork.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pma.errors import Interrupted, MissingExtra, UsageError
from pma.evaluation.quiet import quiet_transformers
from pma.formats import hf_trainer
from pma.pretraining import run_folder
from pma.pretraining.arguments import training_arguments
from pma.pretraining.instructions import InstructionRows
from pma.pretraining.model import build_model, check_model
from pma.pretraining.recipe import ANNEALS, Recipe
from pma.pretraining.run_folder import TOKENS_FILE, Fork, Resumption, RunRecord
from pma.pretraining.tokens import PackedSequences, load_tokens

# called with (step, last step, newest logged loss or None)
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A finished call: the newest checkpoint, its step and tokens, what this call added, and what to mind."""

    run: Path
    checkpoint: Path
    step: int
    tokens: int
    steps_added: int
    resumed_from: int
    seconds: float
    notes: tuple[str, ...] = ()


def pretrain(
    recipe: Recipe, out: Path, *, text: Sequence[str] = (), progress: Progress | None = None
) -> Pretraining:
    """Train `recipe` into the run folder `out`, going on from its newest complete checkpoint if there is one.

    Raises UsageError where `out` holds another run, Interrupted when stopped (the same call goes on).
    """
    check_model(recipe)
    record = RunRecord(recipe=recipe, text=tuple(str(Path(path).resolve()) for path in text))
    run_folder.enter(out, record)
    run_folder.prepare_text(out, recipe, record.text)
    return train(
        out, record, recipe.steps_for(recipe.run.tokens), run_folder.newest_checkpoint(out), progress
    )


def fork(
    checkpoint: Path,
    out: Path,
    *,
    anneal: str,
    tokens: int,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Pretraining:
    """Anneal from `checkpoint` of a run of ours for `tokens` more, by `anneal`, into the run folder `out`.

    The data go on where the checkpoint's run would have gone on; another `seed` gives them another order.
    """
    if anneal not in ANNEALS:
        raise UsageError(f"--anneal {anneal}: expected one of {', '.join(ANNEALS)}")
    trunk = run_folder.read_record(checkpoint.parent)
    start_step = hf_trainer.read_meta(checkpoint).step
    before = trunk.fork or trunk.stage
    if before is not None:
        what = "is annealed already" if trunk.fork else "is a later stage with a schedule of its own"
        raise UsageError(f"{checkpoint} is of a run that {what}; fork from its trunk, {before.checkpoint}")
    if start_step is None or start_step < trunk.recipe.optimizer.warmup_steps:
        raise UsageError(
            f"{checkpoint} is no complete checkpoint after the warmup of "
            f"{trunk.recipe.optimizer.warmup_steps} steps; "
            "fork from a later one"
        )
    recipe = trunk.recipe
    steps = start_step + recipe.steps_for(tokens)
    run = replace(
        recipe.run, tokens=steps * recipe.tokens_a_step, seed=recipe.run.seed if seed is None else seed
    )
    made = Fork(checkpoint=checkpoint.resolve(), start_step=start_step, anneal=anneal, tokens=tokens)
    record = RunRecord(recipe=replace(recipe, run=run), text=trunk.text, fork=made)
    run_folder.enter(out, record)
    run_folder.borrow_text(out, checkpoint.parent)
    newest = run_folder.newest_checkpoint(out) or (checkpoint, start_step)
    return train(out, record, steps, newest, progress)


def resume(
    checkpoint: Path,
    out: Path,
    *,
    tokens: int | None = None,
    skip_steps: int = 0,
    progress: Progress | None = None,
) -> Pretraining:
    """Go on from `checkpoint`, of a run of ours or made from one by `pma init`, in the new run folder `out`.

    Recipe, text, schedule and order of the data are that run's, up to `tokens` in all (its own length by
    default). The data of the next `skip_steps` steps are left out; those behind them come in their place.
    """
    if skip_steps < 0:
        raise UsageError(f"--skip-steps {skip_steps}: expected a count of steps")
    before = run_folder.run_of(checkpoint)
    trunk = run_folder.read_record(before)
    step = hf_trainer.read_meta(checkpoint).step
    if step is None or not (checkpoint / "optimizer.pt").is_file():
        raise UsageError(
            f"{checkpoint} holds no state of the Trainer to go on with; expected a checkpoint of a run, or "
            "what `pma init RUN -o OUT` made of several"
        )
    run = replace(trunk.recipe.run, tokens=tokens or trunk.recipe.run.tokens)
    start = Resumption(checkpoint=checkpoint.resolve(), start_step=step, skip_steps=skip_steps)
    record = replace(trunk, recipe=replace(trunk.recipe, run=run), resumed=start)
    steps = record.recipe.steps_for(run.tokens)
    if steps <= step:
        raise UsageError(f"{checkpoint} is at step {step} already, and the run ends at {steps}; say --tokens")
    run_folder.enter(out, record)
    run_folder.borrow_text(out, before)
    return train(out, record, steps, run_folder.newest_checkpoint(out) or (checkpoint, step), progress)


def train(
    out: Path, record: RunRecord, steps: int, newest: tuple[Path, int] | None, progress: Progress | None
) -> Pretraining:
    """Train the run in `out`, entered and with its text prepared, up to `steps`, going on from `newest`."""
    started = time.monotonic()
    resumed_from = newest[1] if newest else 0
    if resumed_from < steps:
        trainer = _trainer(out, record, steps, newest[0] if newest else None, progress)
        try:
            trainer.train(resume_from_checkpoint=str(newest[0]) if newest else None)
        except KeyboardInterrupt:
            raise Interrupted(
                f"pre-training stopped; the same command goes on from the newest checkpoint in {out}"
            ) from None
    path, step = run_folder.newest_checkpoint(out) or (newest or (out, 0))
    return Pretraining(
        run=out,
        checkpoint=path,
        step=step,
        tokens=step * record.recipe.tokens_a_step,
        steps_added=max(0, steps - resumed_from),
        resumed_from=resumed_from,
        seconds=time.monotonic() - started,
    )


def _trainer(out: Path, record: RunRecord, steps: int, newest: Path | None, progress: Progress | None) -> Any:
    try:
        from transformers import AutoTokenizer, Trainer, default_data_collator
        from transformers.trainer_callback import PrinterCallback

        from pma.online import RecorderCallback
        from pma.pretraining.callbacks import SaveEveryTokens, ShowProgress
    except ImportError as error:
        raise MissingExtra("pre-training", "train", str(error.name)) from error
    quiet_transformers()
    recipe = record.recipe
    start = newest or (record.stage.checkpoint if record.stage else None)
    text = out / run_folder.TEXT_FOLDER
    tokenizer = AutoTokenizer.from_pretrained(text, local_files_only=True)
    callbacks: list[Any] = [SaveEveryTokens(recipe.run.checkpoint_every_tokens, recipe.tokens_a_step, steps)]
    if progress is not None:
        callbacks.append(ShowProgress(progress, steps))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    trainer = Trainer(
        model=build_model(recipe, tokenizer, start),
        args=training_arguments(out, record, steps),
        train_dataset=_data(out, record, steps),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    if recipe.run.interval_means:
        trainer.add_callback(RecorderCallback(trainer))
    trainer.remove_callback(PrinterCallback)  # it prints on stdout, which is for results
    return trainer


def _data(out: Path, record: RunRecord, steps: int) -> Any:
    """The run's sequences, as many as its steps take."""
    recipe, text = record.recipe, out / run_folder.TEXT_FOLDER
    how: dict[str, Any] = {
        "context_tokens": recipe.text.context_tokens,
        "count": steps * recipe.run.batch_sequences,
        "seed": recipe.run.seed,
        "skip": _skip(record),
    }
    if record.stage is not None and record.stage.instructions:
        return InstructionRows(text, **how)
    return PackedSequences(load_tokens(text / TOKENS_FILE), **how)


def _skip(record: RunRecord) -> tuple[int, int]:
    """From which sequence on how many are left out."""
    if record.resumed is None:
        return 0, 0
    a_step = record.recipe.run.batch_sequences
    return record.resumed.start_step * a_step, record.resumed.skip_steps * a_step
