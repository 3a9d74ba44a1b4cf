"""What the transformers Trainer records beside a checkpoint: `trainer_state.json`, and nothing that is a
pickle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pma.errors import FormatError
from pma.formats.strict_json import load_object
from pma.types import CheckpointMeta, TrainingLog

STATE_FILE = "trainer_state.json"
TRAINER_FOLDER = re.compile(r"checkpoint-(?P<step>\d{1,18})", re.ASCII)
RECORD_FILE = "pma.json"  # a merge of ours is complete without the Trainer's state
_TRAINING_FILES = re.compile(
    r"(optimizer|scheduler|scaler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl", re.ASCII
)
_LARGEST_STATE_BYTES = 256 * 2**20
_MOST_MEMORY_BYTES = 768 * 2**20  # of a log with an entry for each of a million steps


def read_meta(folder: Path) -> CheckpointMeta:
    """Step, tokens, learning rate and log of a Trainer's checkpoint; all unknown where there is no
    `trainer_state.json`.

    The Trainer writes that file last, so a `checkpoint-N` without it is still being written.
    `num_input_tokens_seen` stays 0 unless the Trainer was told to count, so 0 means unknown.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        incomplete = None
        if TRAINER_FOLDER.fullmatch(folder.name) and not _completed_by_others(folder):
            incomplete = (
                f"{STATE_FILE} is not there yet, and the Trainer writes it last (a program that writes none "
                "should name its folders step-N)"
            )
        return CheckpointMeta(incomplete=incomplete)
    try:
        state = load_object(path, _LARGEST_STATE_BYTES, _MOST_MEMORY_BYTES)
    except FormatError as error:
        return CheckpointMeta(incomplete=f"{STATE_FILE} is being written, or damaged ({error})")
    step = _count(state.get("global_step"))
    tokens = _count(state.get("num_input_tokens_seen")) or None
    history = state.get("log_history")
    log = _log(history if isinstance(history, list) else [])
    return CheckpointMeta(
        step=step,
        tokens=tokens,
        tokens_source=f"num_input_tokens_seen in {STATE_FILE}" if tokens else None,
        learning_rate=log.learning_rates[-1][1] if log.learning_rates else None,
        log=log,
    )


def _completed_by_others(folder: Path) -> bool:
    """Whether a folder with the name of a Trainer's is a merge of ours, or one of accelerate's `save_state`,
    which ends with random states.
    """
    return (folder / RECORD_FILE).is_file() or any(folder.glob("random_states_*.pkl"))


def training_files(names: Iterable[str]) -> tuple[str, ...]:
    """Those files beside the weights in which the Trainer and accelerate keep what only training needs."""
    return tuple(sorted(name for name in names if _TRAINING_FILES.fullmatch(name)))


def _count(value: object) -> int | None:
    # a number that no counter reaches is no count; it would only overflow later
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _log(history: list[Any]) -> TrainingLog:
    entries = [e for e in history if isinstance(e, dict) and _count(e.get("step")) is not None]
    series: dict[str, list[tuple[int, float]]] = {"learning_rate": [], "loss": []}
    for entry in entries:
        for key, points in series.items():
            value = entry.get(key)
            if isinstance(value, float) or (type(value) is int and abs(value) < 2**63):
                points.append((entry["step"], float(value)))
    rates = [(step, rate) for step, rate in series["learning_rate"] if math.isfinite(rate)]
    return TrainingLog(learning_rates=tuple(rates), losses=tuple(series["loss"]))
