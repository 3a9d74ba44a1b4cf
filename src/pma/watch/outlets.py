"""Where points go beside the store and the page: TensorBoard, Weights & Biases."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pma.errors import MissingExtra
from pma.results import content_key
from pma.watch.points import Point


class Outlet(Protocol):
    """Something that shows points as they come."""

    def add(self, point: Point) -> None:
        """Show a point."""

    def went_back(self, step: int) -> None:
        """Forget what was shown from `step` on, where that can be done: it is of a dead lineage."""

    def close(self) -> None:
        """There are no more points."""


class TensorBoard:
    """Scalars by step in event files in `folder`, under the names that points have."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("TensorBoard", "train", "tensorboard") from error
        self._make: Any = SummaryWriter
        self._folder = folder
        self._writer: Any = None  # made with the first point: a watch that sees nothing leaves no file

    def add(self, point: Point) -> None:
        writer = self._open()
        for name, value in _shown(point).items():
            writer.add_scalar(f"pma/{name}", value, global_step=point.step)
        writer.flush()

    def went_back(self, step: int) -> None:
        # an event file that begins with this mark takes back what others say from that step on
        self.close()
        self._writer = self._make(log_dir=str(self._folder), purge_step=step)

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._make(log_dir=str(self._folder))
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run of Weights & Biases in `project`, the same for every watch of a run with these settings."""

    def __init__(self, project: str, watched: Path, settings_key: str) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise MissingExtra("--wandb", "wandb", "wandb") from error
        self._run = wandb.init(
            project=project,
            name=f"pma watch {watched.name}",
            id=content_key([str(watched.absolute()), settings_key])[:16],
            resume="allow",
        )
        self._run.define_metric("step")
        # by the training step: its own counter must not go back, and a trainer may
        self._run.define_metric("pma/*", step_metric="step")

    def add(self, point: Point) -> None:
        shown = {f"pma/{name}": value for name, value in _shown(point).items()}
        self._run.log({"step": point.step, **shown})

    def went_back(self, step: int) -> None:
        """Its history only grows; the points that follow go over the dead ones."""

    def close(self) -> None:
        self._run.finish()


def _shown(point: Point) -> dict[str, float]:
    return {name: value for name, value in point.values.items() if not name.endswith("_error")} | {
        f"{name}_error": point.values[f"{name}_error"]
        for name in ("gain", "score_gain")
        if f"{name}_error" in point.values
    }
