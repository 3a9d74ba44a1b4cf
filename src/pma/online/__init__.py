"""Averages made while a model trains: interval means, a sliding window, power-function tracks.

Only what is used is imported: `Recorder` needs torch, the callbacks their trainers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pma.errors import MissingExtra

_EXTRAS = {"LightningRecorder": "lightning", "RecorderCallback": "train"}
_HOME = {
    "Recorder": "pma.online.recorder",
    "LightningRecorder": "pma.online.lightning_callback",
    "RecorderCallback": "pma.online.trainer_callback",
    "reconstructed": "pma.online.reconstructing",
}

__all__ = ["LightningRecorder", "Recorder", "RecorderCallback", "reconstructed"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pma.online' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ImportError as error:
        raise MissingExtra(f"pma.online.{name}", _EXTRAS.get(name, "train"), str(error.name)) from error


def __dir__() -> list[str]:
    return __all__
