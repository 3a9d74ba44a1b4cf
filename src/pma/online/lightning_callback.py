"""Lightning's callback: records each optimizer step, stores the mean beside each checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from pma.errors import UsageError
from pma.formats.interval_mean import file_of
from pma.online.recorder import Recorder


class LightningRecorder(Callback):  # type: ignore[misc]  # lightning is not installed where types are checked
    """Keeps a `Recorder` of the module: `Trainer(callbacks=[LightningRecorder(), ModelCheckpoint(…)])`.

    `validate_average`: validation is of the average instead of the weights, as soon as there is one.
    `settings`: the recorder's, such as `every`. The mean of `epoch=1.ckpt` is
    `epoch=1.pma_interval_mean.safetensors`; it is removed when Lightning removes the checkpoint.
    """

    def __init__(self, *, validate_average: bool = False, **settings: Any) -> None:
        self._validates_average = validate_average
        self._settings = settings
        self._resumed: dict[str, Any] | None = None
        self._applied = ExitStack()
        self._stored: list[tuple[Path, Path]] = []
        self.recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise UsageError(
                f"{len(trainer.optimizers)} optimizers: Lightning counts a step for each, so it "
                "could not be told which steps a mean is of; PMA records modules with one"
            )
        self.recorder = Recorder(trainer.strategy.model, optimizer=trainer.optimizers[0], **self._settings)
        if self._resumed is not None:
            self.recorder.load_state_dict(self._resumed)
        self._step = trainer.global_step
        save = trainer.save_checkpoint

        def save_and_store(filepath: Any, *arguments: Any, **options: Any) -> None:
            self._before_saving()
            save(filepath, *arguments, **options)
            self._store(Path(filepath))

        # Lightning calls nothing after a checkpoint is written
        trainer.save_checkpoint = save_and_store

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.recorder is not None and trainer.global_step != self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self.recorder.update(self._step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._validates_average and self.recorder is not None and self.recorder.has_recorded:
            self._applied.enter_context(self.recorder.applied())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._applied.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._applied.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._remove_orphans()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.__dict__.pop("save_checkpoint", None)

    def state_dict(self) -> dict[str, Any]:
        carries = self.recorder is not None and self.recorder.carries_state
        return self.recorder.state_dict() if self.recorder is not None and carries else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict or None

    def _before_saving(self) -> None:
        # a resumed run begins the next interval; what is saved must say so
        if self.recorder is not None:
            self.recorder.end_interval()

    def _store(self, checkpoint: Path) -> None:
        if self.recorder is None:
            return
        path = self.recorder.store(checkpoint)
        if path is not None and path == file_of(checkpoint):
            self._stored.append((checkpoint, path))
        self._remove_orphans()

    def _remove_orphans(self) -> None:
        """Means of checkpoints that Lightning has removed: nothing tells what they belong to."""
        for checkpoint, mean in self._stored:
            if not checkpoint.exists():
                mean.unlink(missing_ok=True)
        self._stored = [entry for entry in self._stored if entry[0].exists()]
