"""Pre-trained Model Averaging: the checkpoints of one pre-training run, averaged into a better model.

    import pma
    run = pma.Choice(paths=(Path("runs/7b"),), window=pma.Window(last=10, every=pma.Tokens(8_000_000_000)))
    pma.merge(run, Path("merged"))

Names are imported when they are first used, so that `import pma` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Choice": "pma.verbs",
    "MergeOptions": "pma.engine",
    "Steps": "pma.quantities",
    "Tokens": "pma.quantities",
    "Window": "pma.trajectory",
    "average": "pma.verbs",
    "discover": "pma.trajectory",
    "evaluate": "pma.verbs",
    "fork": "pma.pretraining",
    "init": "pma.verbs",
    "inspect": "pma.verbs",
    "location": "pma.remote",
    "merge": "pma.verbs",
    "plan": "pma.verbs",
    "pretrain": "pma.pretraining",
    "spikes": "pma.trajectory",
    "verify": "pma.engine",
}

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "MergeOptions",
    "Steps",
    "Tokens",
    "Window",
    "__version__",
    "average",
    "discover",
    "evaluate",
    "fork",
    "init",
    "inspect",
    "location",
    "merge",
    "plan",
    "pretrain",
    "spikes",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pma' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
