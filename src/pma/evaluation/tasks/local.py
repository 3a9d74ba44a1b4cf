"""Local files as tasks of the harness: a typed table and a generated YAML for each, in a passing folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pma.evaluation.tasks.files import LocalTask
from pma.evaluation.tasks.harness import Task


def local_tasks(local: Sequence[LocalTask], folder: Path) -> Iterator[Task]:
    """Each of `local`; when one is wanted, the harness loads it from files that are written into `folder`."""
    for task in local:
        metric = "acc_norm" if task.kind == "choices" and not _is_pairs(task) else "acc"
        load = _Loaded(task, folder / task.name)
        yield Task(name=task.name, digest=task.digest, metric=metric, load=load, limit=None)


class _Loaded:
    """The harness's objects, made when first wanted, from files in `folder`; where this was sent to another
    process, in a folder of that one, which passes at once: the table is mapped by then.
    """

    def __init__(self, task: LocalTask, folder: Path | None) -> None:
        self._task, self._folder = task, folder
        self._loaded: Any = None

    def __call__(self) -> Any:
        if self._loaded is None and self._folder is not None:
            self._loaded = _load(self._task, self._folder)
        if self._loaded is None:
            with TemporaryDirectory(prefix="pma-tasks-") as folder:
                self._loaded = _load(self._task, Path(folder) / self._task.name)
        return self._loaded

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, (self._task, None)


def _load(task: LocalTask, folder: Path) -> Any:
    import pyarrow
    import pyarrow.parquet
    from lm_eval.tasks import TaskManager

    columns = [("context", pyarrow.string()), ("choices", pyarrow.list_(pyarrow.string()))]
    columns += [("gold", pyarrow.int64()), ("target", pyarrow.string())]
    # typed, unlike JSON, in which the harness's reader would take choices that look like dates for dates
    schema = pyarrow.schema([pyarrow.field(*column) for column in columns if column[0] in task.items[0]])
    items = list(task.items)
    if task.kind == "target":
        items = [{**item, "target": task.delimiter + item["target"]} for item in items]
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items, schema), folder / "items.parquet")
    (folder / "task.yaml").write_text(json.dumps(_yaml(task, folder)), encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with _unreported():
        return manager.load([task.name])


@contextmanager
def _unreported() -> Iterator[None]:
    """The reader of tables tells a server of every file it reads, also of local ones; not of these."""
    from datasets import config

    usual = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = usual


def _yaml(task: LocalTask, folder: Path) -> dict[str, Any]:
    """A task of the harness whose fields are the file's columns: no text of the file becomes a template."""
    metrics = ["acc", "acc_norm"] if task.kind == "choices" else ["acc"]
    kind = (
        {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        if task.kind == "choices"
        else {"output_type": "loglikelihood", "doc_to_target": "target"}
    )
    return {
        "task": task.name,
        "dataset_path": "parquet",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "items.parquet")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "context",
        **kind,
        "target_delimiter": task.delimiter,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
        "metadata": {"version": 1, "items": task.digest},
    }


def _is_pairs(task: LocalTask) -> bool:
    """Whole sentences, as in BLiMP: told apart by probability, not by probability per character."""
    return all(item["context"] == "" for item in task.items)
