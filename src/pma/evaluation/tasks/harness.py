"""What we know of lm-evaluation-harness before it is imported: what a task is, its version, its noise."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from pma.errors import MissingExtra


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, or one group of the harness's, ready to be run. `metric` is what counts as its score.

    `digest`: of its items, for finding results again. `load` gives the harness's objects (its TaskDict), the
    same each time; it may be sent to another process, and loads them there. `limit`: items of each of the
    harness's own tasks (those of local files are picked as they are read).
    """

    name: str
    digest: str
    metric: str
    load: Callable[[], Mapping[str, Any]]
    limit: int | None

    @property
    def key(self) -> dict[str, Any]:
        """What results depend on, beside the model, its tokenizer and the context length."""
        return {"task": self.name, "items": self.digest, "limit": self.limit, "harness": harness_version()}


def harness_version() -> str:
    """The version of lm-evaluation-harness. Raises MissingExtra where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm-eval")
    except PackageNotFoundError as error:
        raise MissingExtra("evaluation by tasks", "eval", "lm-eval") from error


@contextmanager
def quiet() -> Iterator[None]:
    """The harness and its libraries write progress and advice to both streams, also between our JSON."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
