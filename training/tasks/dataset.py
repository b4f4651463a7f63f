"""The task `dataset`: data sets on the hub, and Parquet, CSV or JSON files; `datasets` reads them."""

from collections.abc import Mapping
from typing import Any

from measuring.examples import Example
from measuring.json_lines import DataError, is_text
from training.tasks.base import register
from training.tasks.finite import FiniteTask, Splits, conversation, example

Files = str | list[str] | dict[str, str | list[str]]


@register
class HubDataset(FiniteTask):
    """A task over splits of a dataset. With a judge, a row needs no target.

    Args:
        path: a name on the hub, a directory, or a format: parquet, csv, json.
        name: the dataset's configuration, if it has several.
        revision: revision of a dataset on the hub; None: the latest.
        data_files: files of a format, by split if there are several.
        train: split to train on, or a part of one, e.g. `train[:90%]`.
        valid: split to validate and calibrate on.
        test: split to evaluate on.
        source: column of the source, the text of a user message.
        target: column of the answer.
        messages: column of whole conversations, used instead of `source`. If a conversation ends with the
            assistant's answer, this answer is the target.
        metric: see `FiniteTask`.
        judge: see `FiniteTask`.
        router: see `FiniteTask`.

    Raises:
        DataError: the dataset cannot be read, or a row cannot be used.
        ValueError: see `FiniteTask`.
    """

    name = "dataset"

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        data_files: Files | None = None,
        train: str = "train",
        valid: str = "validation",
        test: str = "test",
        source: str = "source",
        target: str = "target",
        messages: str | None = None,
        metric: str = "exact",
        judge: str | Mapping[str, Any] | None = None,
        router: int = 0,
    ) -> None:
        self._columns = (source, target, messages)
        place = {"path": path, "name": name, "revision": revision, "data_files": data_files}
        splits = Splits(self._read(place, train), self._read(place, valid), self._read(place, test))
        super().__init__(splits, metric, judge, router)

    def _read(self, place: dict[str, Any], split: str) -> list[Example]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            rows = load_dataset(**place, split=split)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            problem = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"dataset {place['path']}, split {split}: {problem[0]}") from error
        if not len(rows):
            raise DataError(f"dataset {place['path']}, split {split}: is empty")
        examples = []
        for number, row in enumerate(rows):
            try:
                examples.append(self._example(row))
            except DataError as error:
                raise DataError(f"dataset {place['path']}, split {split}, row {number}: {error}") from error
        return examples

    def _example(self, row: dict[str, Any]) -> Example:
        source, target, messages = self._columns
        answer = None if row.get(target) is None else _text(row, target)
        if messages is not None:
            if messages not in row:
                raise DataError(f"has no column {messages!r}, only {', '.join(row)}")
            return conversation(row[messages], answer)
        return example(_text(row, source), answer)


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise DataError(f"has no column {column!r}, only {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str) or not is_text(value):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    return value
