"""What the Trainer is told while it trains: when to save, and whom to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class SaveEveryTokens(TrainerCallback):
    """Saves at the first step at or past each multiple of `every_tokens`, and at the last step."""

    def __init__(self, every_tokens: int, tokens_a_step: int, last_step: int) -> None:
        self._every_tokens = every_tokens
        self._tokens_a_step = tokens_a_step
        self._last_step = last_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tokens = state.global_step * self._tokens_a_step
        passed = tokens // self._every_tokens > (tokens - self._tokens_a_step) // self._every_tokens
        if passed or state.global_step == self._last_step:
            control.should_save = True


class ShowProgress(TrainerCallback):
    """Reports each step with the newest logged loss."""

    def __init__(self, report: Callable[[int, int, float | None], None], last_step: int) -> None:
        self._report = report
        self._last_step = last_step
        self._loss: float | None = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state.global_step, self._last_step, self._loss)
