"""Multiple choice and last-word tasks through lm-evaluation-harness: its own, and local JSONL files."""

from pma.evaluation.tasks.harness import Task
from pma.evaluation.tasks.run import prepared, run_task
from pma.evaluation.tasks.scores import TaskResult, task_weights

__all__ = ["Task", "TaskResult", "prepared", "run_task", "task_weights"]
