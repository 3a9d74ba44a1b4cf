"""Before the first model is made: every node has what measuring needs, and sees the same sources."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from pma.engine import Plan
from pma.engine.on_ray import recipes
from pma.engine.on_ray.answers import Answer, answered
from pma.errors import UsageError


def packed(plans: Sequence[Plan], needs: Iterable[str]) -> bytes:
    """What `look` wants to see. `needs`: distributions of which a node has to have our version."""
    ours = {name: found for name in sorted(set(needs)) if (found := _version(name)) is not None}
    return pickle.dumps((ours, recipes.packed(plans)))


def look(packed: bytes, who: str) -> Answer:
    """On a node: whether it has the same versions and plans the same."""
    ours, plans = pickle.loads(packed)
    return answered(who, lambda: _same_versions(ours, who)) or recipes.look(plans, who)


def _same_versions(ours: dict[str, str], who: str) -> Answer:
    for name, wanted in ours.items():
        found = _version(name)
        if found is None:
            raise UsageError(
                f"{who}: {name} is not installed; evaluation needs it on every node: "
                "pip install 'pma-llm[eval]'"
            )
        if found != wanted:
            raise UsageError(f"{who}: {name} {found}, and {wanted} here; results would differ by it")
    return {}


def _version(name: str) -> str | None:
    """Without what tells builds for processors and GPUs apart."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None
