"""Averages made while a model trains: interval means, a sliding window, power-function tracks.

Only what is used is imported: `Recorder` needs torch, the callbacks their trainers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"Recorder": "pma.online.recorder"}

__all__ = ["Recorder"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pma.online' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
