"""Tasks by name: `numbers` (ships with the project) and `jsonl` (any file with source and target)."""

from measuring.examples import Example, References
from training.tasks import jsonl, numbers  # noqa: F401  (registers them)
from training.tasks.base import TASKS, Scores, Task, make_task

__all__ = ["TASKS", "Example", "References", "Scores", "Task", "make_task"]
