"""The same for several checkpoints: one after the other on this machine, several at once in a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pma.remote.path import RemotePath

T = TypeVar("T")

_AT_ONCE = 8


def each_at_once(function: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """`function` of each path, in order. Raises what the first that failed raised."""
    if len(paths) < 2 or not any(isinstance(path, RemotePath) for path in paths):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, paths))
