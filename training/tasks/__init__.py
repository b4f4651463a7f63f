"""Tasks by name.

`numbers` makes its own data, `jsonl` reads files of JSON lines, and `dataset` reads all that the library
`datasets` can read.
"""

from measuring.examples import Example, References
from training.tasks import dataset, jsonl, numbers  # noqa: F401  (registers them)
from training.tasks.base import TASKS, Scores, Task, make_task

__all__ = ["TASKS", "Example", "References", "Scores", "Task", "make_task"]
