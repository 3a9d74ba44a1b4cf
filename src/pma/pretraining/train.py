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

from pma.errors import InputError, Interrupted, MissingExtra, UsageError, printable
from pma.evaluation.quiet import quiet_transformers
from pma.formats import hf_trainer
from pma.pretraining import run_folder
from pma.pretraining.recipe import ANNEALS, Recipe
from pma.pretraining.run_folder import TOKENS_FILE, Fork, Resumption, RunRecord
from pma.pretraining.tokens import PackedSequences, load_tokens

# called with (step, last step, newest logged loss or None)
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A finished call: the newest checkpoint, its step and tokens, and what this call added."""

    run: Path
    checkpoint: Path
    step: int
    tokens: int
    steps_added: int
    resumed_from: int
    seconds: float


def pretrain(
    recipe: Recipe, out: Path, *, text: Sequence[str] = (), progress: Progress | None = None
) -> Pretraining:
    """Train `recipe` into the run folder `out`, going on from its newest complete checkpoint if there is one.

    Raises UsageError where `out` holds another run, Interrupted when stopped (the same call goes on).
    """
    _check_model(recipe)
    record = RunRecord(recipe=recipe, text=tuple(str(Path(path).resolve()) for path in text))
    run_folder.enter(out, record)
    run_folder.prepare_text(out, recipe, record.text)
    return _train(
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
    if trunk.fork is not None:
        raise UsageError(
            f"{checkpoint} is of a run that is annealed already; fork from its trunk, {trunk.fork.checkpoint}"
        )
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
    return _train(out, record, steps, newest, progress)


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
    return _train(out, record, steps, run_folder.newest_checkpoint(out) or (checkpoint, step), progress)


def _train(
    out: Path, record: RunRecord, steps: int, newest: tuple[Path, int] | None, progress: Progress | None
) -> Pretraining:
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
    text = out / run_folder.TEXT_FOLDER
    tokenizer = AutoTokenizer.from_pretrained(text, local_files_only=True)
    data = PackedSequences(
        load_tokens(text / TOKENS_FILE),
        context_tokens=recipe.text.context_tokens,
        count=steps * recipe.run.batch_sequences,
        seed=recipe.run.seed,
        skip=_skip(record),
    )
    callbacks: list[Any] = [SaveEveryTokens(recipe.run.checkpoint_every_tokens, recipe.tokens_a_step, steps)]
    if progress is not None:
        callbacks.append(ShowProgress(progress, steps))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    trainer = Trainer(
        model=_model(recipe, tokenizer, newest),
        args=_arguments(out, record, steps),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    if recipe.run.interval_means:
        trainer.add_callback(RecorderCallback(trainer))
    trainer.remove_callback(PrinterCallback)  # it prints on stdout, which is for results
    return trainer


def _skip(record: RunRecord) -> tuple[int, int]:
    """From which sequence on how many are left out."""
    if record.resumed is None:
        return 0, 0
    a_step = record.recipe.run.batch_sequences
    return record.resumed.start_step * a_step, record.resumed.skip_steps * a_step


def _check_model(recipe: Recipe) -> None:
    """Raises UsageError for a model that transformers cannot build, before anything is written."""
    try:
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("pre-training", "train", str(error.name)) from error
    quiet_transformers()
    try:
        known = AutoConfig.for_model(recipe.model["model_type"])
        for name in recipe.model:
            if not hasattr(known, name):
                raise UsageError(
                    f"recipe {recipe.name}: [model] {name} is unknown to {recipe.model['model_type']}"
                )
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(_config(recipe, end_of_text=0))
    except (StrictDataclassError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"recipe {recipe.name}: transformers cannot build its model: {printable(str(error))}"
        ) from error


def _config(recipe: Recipe, end_of_text: int) -> Any:
    from transformers import AutoConfig

    settings = dict(recipe.model)
    return AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        vocab_size=recipe.text.vocabulary_tokens,
        max_position_embeddings=recipe.text.context_tokens,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        use_cache=False,
    )


def _model(recipe: Recipe, tokenizer: Any, checkpoint: Path | None) -> Any:
    """A new model, or the checkpoint's.

    The Trainer's own resume is not enough: transformers 5 stores a mixture's experts one by one but holds
    them fused, and the Trainer loads by name, not strictly, so a resumed mixture would silently keep freshly
    drawn experts.
    """
    from transformers import AutoModelForCausalLM, set_seed

    config = _config(recipe, tokenizer.eos_token_id)
    set_seed(recipe.run.seed)
    if checkpoint is None:
        return AutoModelForCausalLM.from_config(config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise InputError(
            f"{checkpoint} does not fit the run's recipe, for example {printable(str(wrong[0]))}"
        )
    return model


def _arguments(out: Path, record: RunRecord, steps: int) -> Any:
    import torch
    from transformers import TrainingArguments

    recipe, optimizer = record.recipe, record.recipe.optimizer
    micro = recipe.run.micro_batch_sequences or recipe.run.batch_sequences
    schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
    if record.fork is not None:
        # stable until the fork: the same curve as the trunk's, so the trunk's scheduler state stays valid
        schedule = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": steps - record.fork.start_step,
                "decay_type": record.fork.anneal,
                "warmup_type": "linear",
            },
        }
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.run.batch_sequences // micro,
        train_sampling_strategy="sequential",
        learning_rate=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clip,
        bf16=recipe.run.precision == "bfloat16",
        torch_compile=recipe.run.compiled,
        include_num_input_tokens_seen="all",
        save_strategy="no",
        logging_steps=recipe.run.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number is shown as it is
        report_to=["tensorboard"],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.run.seed,
        **schedule,
    )
