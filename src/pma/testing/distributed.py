"""Distributed checkpoints made and read by torch itself: programs in several ranks on CPU, and its loader."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def torchrun(script: Path, ranks: int, *arguments: object) -> None:
    """Run `script` in so many processes on CPU. Raises AssertionError with its output if it fails."""
    _run(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"], script, arguments)


def in_ranks(script: Path, ranks: int, *arguments: object) -> None:
    """The same, sooner: for scripts whose imports start no threads, as the ranks are forked after them."""
    _run([str(Path(__file__).with_name("ranks.py")), str(ranks)], script, arguments)


def _run(launcher: list[str], script: Path, arguments: tuple[object, ...]) -> None:
    command = [sys.executable, "-W", "ignore", *launcher, str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def load_dcp(folder: Path, reader: Callable[[Path], Any] | None = None) -> dict[str, Any]:
    """The state dict of a DCP folder, flat or nested as it was saved, in whole tensors, by torch's loader.

    `reader`: makes a storage reader other than torch's own.
    """
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load_state_dict(
            found, storage_reader=(reader or FileSystemReader)(folder), planner=planner, no_dist=True
        )
    return found


def flattened(nested: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state dict with names joined by dots, as DCP joins them."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {k: v for key, value in nested.items() for k, v in flattened(value, _join(prefix, key)).items()}


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def tensor_bytes(tensor: Any) -> bytes:
    """A torch tensor's elements, row-major."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def as_float64(tensor: Any) -> Any:
    """A torch tensor as a numpy array of fp64."""
    import torch

    return tensor.detach().to(torch.float64).numpy()
