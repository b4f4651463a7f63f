"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _few_examples_are_drawn_at_once() -> Iterator[None]:
    """Draw few examples: many take longer than a test's few steps, and no test is about their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.batches.SHARD_BATCHES", 8)
        yield


@pytest.fixture(scope="session")
def untrained_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `teacher` and `student`; tests must not change it."""
    from tests.helpers.numbers import save_untrained_pair, tokenizer_of_numbers

    directory = tmp_path_factory.mktemp("untrained_pair")
    save_untrained_pair(tokenizer_of_numbers(), directory)
    return directory
