"""The transformers Trainer's callback: records each step, stores the mean at each save, evaluates it at each
evaluation.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pma.errors import UsageError
from pma.online.recorder import Recorder

_LOG = logging.getLogger(__name__)


class RecorderCallback(TrainerCallback):
    """Keeps a `Recorder` of the trainer's model.

        trainer.add_callback(RecorderCallback(trainer))

    `evaluate`: whenever the trainer evaluates, the average is evaluated on the same data and logged as
    `eval_merged_loss` beside `eval_loss`. `resume_from`: the checkpoint that training resumes from, where it
    is not in the trainer's output folder; only a window and tracks need it. `settings`: the recorder's, such
    as `every`.
    """

    def __init__(
        self, trainer: Any, *, evaluate: bool = True, resume_from: Path | str | None = None, **settings: Any
    ) -> None:
        self._trainer = trainer
        self._evaluates = evaluate
        self._resume_from = resume_from
        self._settings = settings
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        if trainer.is_deepspeed_enabled:
            raise UsageError(
                "DeepSpeed partitions masters by hand; PMA records plain, DDP and FSDP2 training"
            )
        optimizer = trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.recorder = Recorder(trainer.model_wrapped, optimizer=optimizer, **self._settings)
        if state.global_step and self.recorder.carries_state:
            came_from = self._resume_from or args.resume_from_checkpoint
            folder = Path(came_from) if isinstance(came_from, (str, Path)) else _folder(args, state)
            if not self.recorder.load_state(folder):
                _LOG.warning("%s holds no recorder's state: window and tracks begin anew", folder)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.recorder.update(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.recorder.save(_folder(args, state))
            self.recorder.save_state(_folder(args, state))

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Evaluates the average as the trainer has just evaluated its weights; adds to its metrics."""
        keys = [key for key in metrics or () if key.endswith("_loss")]
        if not self._evaluates or self.recorder is None or not self.recorder.has_recorded or not keys:
            return
        prefix = keys[0].removesuffix("_loss") + "_merged"
        devices = [args.device] if args.device.type == "cuda" else []
        # a data loader draws a seed: training must go on as it would without this evaluation
        with torch.random.fork_rng(devices=devices), self.recorder.applied():
            output = self._trainer.evaluation_loop(
                eval_dataloader,
                "Evaluation of the average",
                prediction_loss_only=True,
                metric_key_prefix=prefix,
            )
        merged = {f"{prefix}_loss": output.metrics[f"{prefix}_loss"]}
        if metrics is not None:
            metrics.update(merged)
        self._trainer.log(merged)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
