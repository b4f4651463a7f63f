"""Tasks by name: `numbers` (ships with the project), `docstrings` (from installed packages) and `jsonl` (any
file with source and target).
"""

from training.tasks import docstrings, jsonl, numbers  # noqa: F401  (registers them)
from training.tasks.base import TASKS, Example, References, Scores, Task, make_task

__all__ = ["TASKS", "Example", "References", "Scores", "Task", "make_task"]
