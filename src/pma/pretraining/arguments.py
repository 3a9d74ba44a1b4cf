"""What the Trainer is told of a run: its schedule, optimizer, precision, and what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pma.pretraining.recipe import CONSTANT
from pma.pretraining.run_folder import RunRecord


def training_arguments(out: Path, record: RunRecord, steps: int) -> Any:
    """The `TrainingArguments` of a run of `steps`."""
    import torch
    from transformers import TrainingArguments

    recipe, optimizer = record.recipe, record.recipe.optimizer
    micro = recipe.run.micro_batch_sequences or recipe.run.batch_sequences
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
        **_schedule(record, steps),
    )


def _schedule(record: RunRecord, steps: int) -> dict[str, Any]:
    """Warmup, then constant; a fork decays to zero at the end, a later stage to its final rate."""
    optimizer, stage = record.recipe.optimizer, record.stage
    if record.fork is not None:
        # stable until the fork: the same curve as the trunk's, so the trunk's scheduler state stays valid
        return _decay(steps - record.fork.start_step, record.fork.anneal)
    if stage is not None and stage.schedule != CONSTANT:
        floor = stage.final_learning_rate / optimizer.learning_rate
        return _decay(steps - optimizer.warmup_steps, stage.schedule, min_lr_ratio=floor)
    return {"lr_scheduler_type": "constant_with_warmup"}


def _decay(decay_steps: int, shape: str, **more: Any) -> dict[str, Any]:
    how = {"num_decay_steps": decay_steps, "decay_type": shape, "warmup_type": "linear", **more}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": how}
