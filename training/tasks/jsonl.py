"""The task `jsonl`: files of lines `{"source": ..., "target": ...}` or `{"messages": ...}`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring.examples import Example
from measuring.json_lines import DataError, Row, read_some_json_lines
from training.tasks.base import register
from training.tasks.finite import FiniteTask, Splits, conversation, example


@register
class Jsonl(FiniteTask):
    """A task over files in a directory. With a judge, a line needs no target.

    Args:
        directory: directory of the files.
        train: name of the file to train on.
        valid: name of the file to validate and calibrate on.
        test: name of the file to evaluate on.
        metric: see `FiniteTask`.
        judge: see `FiniteTask`.
        router: see `FiniteTask`.

    Raises:
        DataError: a file or one of its lines cannot be used; the message names it.
        ValueError: see `FiniteTask`.
    """

    name = "jsonl"

    def __init__(
        self,
        directory: str = ".",
        train: str = "train.jsonl",
        valid: str = "valid.jsonl",
        test: str = "test.jsonl",
        metric: str = "exact",
        judge: str | Mapping[str, Any] | None = None,
        router: int = 0,
    ) -> None:
        place = Path(directory)
        judged = judge is not None
        splits = Splits(
            _read(place / train, judged), _read(place / valid, judged), _read(place / test, judged)
        )
        super().__init__(splits, metric, judge, router)


def _read(file: Path, judged: bool) -> list[Example]:
    return [_example(row, judged) for row in read_some_json_lines(file)]


def _example(row: Row, judged: bool) -> Example:
    target = row.text("target") if "target" in row.fields else None
    if "messages" not in row.fields:
        return example(row.text("source"), target if judged else row.text("target"))
    try:
        found = conversation(row.fields["messages"], target)
    except DataError as error:
        raise row.error(str(error)) from error
    if not found.references and not judged:
        raise row.error("'messages' must end with an answer, unless the task has a judge")
    return found
