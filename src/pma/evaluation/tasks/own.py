"""The harness's own tasks, by name. Their data come from where the harness finds them, mostly the network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pma.errors import InputError, MismatchError, UsageError, printable
from pma.evaluation.tasks.harness import Task, harness_version
from pma.results import content_key

_PREFERRED = ("acc_norm", "acc", "exact_match")


def own_tasks(names: Sequence[str], limit: int | None) -> Iterator[Task]:
    """Each of `names`; a tag, or a group without a score of its own, gives the tasks in it.

    Raises UsageError for a name that is not known, and for a task that cannot be used; InputError for data
    that cannot be reached.
    """
    if not names:
        return
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if (
            name not in manager.task_index
        ):  # anything else might be the path of a YAML file, which can name code
            near = get_close_matches(name, manager.all_tasks, 3)
            raise UsageError(
                f"--tasks {printable(name)}: neither a task of lm-evaluation-harness {harness_version()} "
                "nor a .jsonl file or folder" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # what a thousand tasks' own code and their data's hosts may raise
            raise InputError(
                f"task {name} of the harness cannot be loaded, most likely as its data cannot be reached "
                f"({type(error).__name__}: {printable(str(error))}); local files need no network, see "
                "docs/tasks.md"
            ) from error
        group = loaded["groups"].get(name)
        if group is not None and group.has_aggregation:
            yield _own_task(name, loaded, limit)
            continue
        for leaf, task in loaded["tasks"].items():
            yield _own_task(leaf, {"tasks": {leaf: task}, "groups": {}}, limit)


def _own_task(name: str, loaded: Mapping[str, Any], limit: int | None) -> Task:
    from lm_eval.api.metrics import mean

    group = loaded["groups"].get(name)
    shared: list[str] | None = [each.metric for each in group.aggregate_metric_list] if group else None
    for leaf, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"task {leaf} runs code that the model writes; PMA does not")
        better = task.higher_is_better()
        found = [m for m, aggregate in task.aggregation().items() if aggregate is mean and better.get(m)]
        shared = [m for m in shared if m in found] if shared is not None else found
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    if not shared:
        raise UsageError(
            f"task {name} has no score that is a mean over items, so models cannot be paired on it; held-out "
            "losses are measured with --text"
        )
    metric = next((each for each in _PREFERRED if each in shared), shared[0])
    items = [
        [leaf, str(task.VERSION), json.dumps(list(task.eval_docs), default=str)]
        for leaf, task in loaded["tasks"].items()
    ]
    digest = content_key(items)
    load = _Loaded(name, digest, limit, loaded)
    return Task(name=name, digest=digest, metric=metric, load=load, limit=limit)


class _Loaded:
    """The harness's objects of a task; where this was sent to another process they are loaded there, and have
    to be of the same items.
    """

    def __init__(self, name: str, digest: str, limit: int | None, loaded: Mapping[str, Any] | None) -> None:
        self._name, self._digest, self._limit, self._loaded = name, digest, limit, loaded

    def __call__(self) -> Mapping[str, Any]:
        if self._loaded is None:
            (found,) = own_tasks([self._name], self._limit)
            if found.digest != self._digest:
                raise MismatchError(
                    f"task {self._name} of the harness has other items here than where the command was "
                    "given; every node has to find the same data and the same version of the harness"
                )
            self._loaded = found.load()
        return self._loaded

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, (self._name, self._digest, self._limit, None)
